"""Publishing to a Hub on the loopback address with the real client: refusals, interruptions, dry runs."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bomb import write_bomb
from damage import edit_config, edit_json, edit_weights, pickle_weights, save_baseline, truncate
from hub_server import IGNORE_UPLOAD_WARNING, READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, constants
from tiny import save_checkpoint, tiny_tokenizer

from hf_alibi import AlibiGPTForSequenceClassification
from hf_alibi.errors import UserError
from hf_alibi.hub.checkpoints import load_causal_lm
from hf_alibi.hub.model_card import CardArguments
from hf_alibi.hub.publish import publish

pytestmark = IGNORE_UPLOAD_WARNING


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Yields an empty Hub."""
    with HubServer() as server:
        server.connect(tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Returns a checkpoint of 140 kB."""
    return save_checkpoint(tmp_path / "tiny")


def edit_norm(folder: Path, norm: torch.Tensor) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": norm}))


def save_classifier(folder: Path) -> None:
    AlibiGPTForSequenceClassification.from_pretrained(folder).save_pretrained(folder)


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "truncated": (lambda folder: truncate(folder / "model.safetensors"), "cannot load the weights"),
    "wrong shape": (lambda folder: edit_norm(folder, torch.ones(3, 5)), r"model.norm.weight has shape \[3, 5\]"),
    "not finite": (
        lambda folder: edit_norm(folder, torch.full((32,), torch.nan)),
        "model.norm.weight holds values that are not finite",
    ),
    "pickle": (pickle_weights, "pickled weights can run code and are never read"),
    "config": (lambda folder: edit_config(folder, num_key_value_heads=3), "cannot share 3 key-value"),
    "generation config": (
        lambda folder: edit_json(folder / "generation_config.json", max_new_tokens=-1),
        "generation_config.json is not valid: `max_new_tokens` must be greater than 0",
    ),
    "half a generation config": (lambda folder: truncate(folder / "generation_config.json"), "generation_config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load a tokenizer"),
    "baseline": (save_baseline, "only AlibiGPTForCausalLM can be published"),
    "head": (save_classifier, r"holds \['AlibiGPTForSequenceClassification'\]; only AlibiGPTForCausalLM"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED.keys())
def test_a_tampered_checkpoint_is_refused_before_anything_is_sent(
    hub: HubServer, checkpoint: Path, tamper: Callable[[Path], Any], message: str
) -> None:
    tamper(checkpoint)
    with pytest.raises(UserError, match=message) as error_info:
        publish(checkpoint, "tester/tiny")
    assert "\n" not in str(error_info.value)
    assert not hub.repositories
    assert not (checkpoint / "crater").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "hf_wrong"}, "the Hub answers 401, Invalid credentials in Authorization header; log in"),
        ({"token": READ_TOKEN}, "the Hub answers 403, You don't have the rights .*; use a token with the right"),
        ({"repo_id": "somebody/tiny"}, "somebody/tiny: the Hub answers 403"),
        ({"repo_id": "tester/missing", "create_pr": True}, "there is no repository tester/missing, or the token"),
        ({"revision": "refs/pr/9"}, "tester/public has no such revision: Invalid rev id: refs/pr/9"),
        ({"private": True}, "tester/public is public; make it private"),
        ({"repo_id": "tiny"}, "'tiny' lacks its namespace; give it as me/tiny"),
        ({"repo_id": "tester/a tiny one"}, "tester/a tiny one: Repo id must"),
        ({"card": CardArguments(license="My own")}, 'Invalid metadata in README.md. - "license" must be one of'),
        ({"max_shard_size": "many"}, "cannot be saved: .* Supported units are TB, GB, MB, KB"),
    ],
    ids=[
        "token",
        "read token",
        "namespace",
        "repository",
        "revision",
        "public",
        "name",
        "characters",
        "card",
        "shard size",
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line(
    hub: HubServer, checkpoint: Path, arguments: dict[str, Any], message: str
) -> None:
    HfApi().create_repo("tester/public")
    with pytest.raises(UserError, match=message) as error_info:
        publish(checkpoint, **({"repo_id": "tester/public"} | arguments))
    assert "\n" not in str(error_info.value)
    assert list(hub.repositories) == ["tester/public"]
    assert list(hub.files("tester/public")) == [".gitattributes"]


def test_without_a_token_the_advice_is_to_log_in(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="the Hub answers 401, Invalid username or password; log in with `hf auth"):
        publish(checkpoint, "tester/tiny")
    assert not hub.repositories


def test_offline_and_unreachable_are_told_apart(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the upload to tester/tiny broke off: .*refused"):
        publish(checkpoint, "tester/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="tester/tiny cannot be reached: HF_HUB_OFFLINE is set"):
        publish(checkpoint, "tester/tiny")


def test_an_interrupted_upload_changes_nothing_and_can_be_repeated(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, _ = load_causal_lm(checkpoint, device="cpu")
    torch.nn.init.normal_(earlier.get_input_embeddings().weight)
    earlier.push_to_hub("tester/tiny", private=True)
    tiny_tokenizer().push_to_hub("tester/tiny")
    before = hub.files("tester/tiny")
    hub.uploads.clear()

    hub.drop("/commit/")
    with pytest.raises(UserError, match=r"broke off: .*; try again, and only what is missing is sent"):
        publish(checkpoint, "tester/tiny", max_shard_size="50KB")
    assert hub.files("tester/tiny") == before
    loaded, _ = load_causal_lm("tester/tiny", device="cpu")
    assert torch.equal(loaded.get_input_embeddings().weight, earlier.get_input_embeddings().weight)
    sent = sorted(hub.uploads)
    assert len(sent) == 3

    monkeypatch.delenv("HF_TOKEN")
    publish(checkpoint, "tester/tiny", max_shard_size="50KB", token=WRITE_TOKEN)
    assert sorted(hub.uploads) == sent
    assert "model-00003-of-00003.safetensors" in hub.files("tester/tiny")
    assert "model.safetensors" not in hub.files("tester/tiny")


@pytest.mark.slow
def test_a_connection_that_stays_lost_ends_in_a_line(hub: HubServer, checkpoint: Path) -> None:
    hub.drop("/lfs/", times=100)
    with pytest.raises(UserError, match="the upload to tester/tiny broke off"):
        publish(checkpoint, "tester/tiny")
    assert list(hub.files("tester/tiny")) == [".gitattributes"]


@pytest.mark.slow
def test_a_pull_request_leaves_the_main_branch_alone(hub: HubServer, checkpoint: Path) -> None:
    HfApi().create_repo("tester/tiny")
    commit = publish(checkpoint, "tester/tiny", create_pr=True)
    assert commit is not None
    assert commit.pr_revision == "refs/pr/1"
    assert "model.safetensors" in hub.files("tester/tiny", "refs/pr/1")
    assert list(hub.files("tester/tiny")) == [".gitattributes"]
    again = publish(checkpoint, "tester/tiny", revision="refs/pr/1")
    assert again is not None
    # Nothing had to change.
    assert again.oid == commit.oid


def test_loading_what_is_missing_or_hidden_is_refused_in_a_line(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    HfApi().create_repo("tester/hidden", private=True)
    for repo_id, token in [("tester/missing", WRITE_TOKEN), ("tester/hidden", "hf_wrong"), ("tester/hidden", "")]:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=f"cannot load the config of {repo_id}") as error_info:
            load_causal_lm(repo_id, device="cpu")
        assert "\n" not in str(error_info.value)


def test_a_repository_of_pickles_is_refused(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    write_bomb(checkpoint / "pytorch_model.bin", tmp_path / "crater")
    HfApi().create_repo("tester/bomb")
    HfApi().upload_folder(repo_id="tester/bomb", folder_path=checkpoint)
    with pytest.raises(UserError, match="cannot load the weights of tester/bomb"):
        load_causal_lm("tester/bomb", device="cpu")
    assert not (tmp_path / "crater").exists()
