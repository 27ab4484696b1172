"""Published models load in a new process that has only torch and transformers, and in one with the package."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from bomb import write_bomb
from fresh import Request, run_fresh
from hub_server import IGNORE_UPLOAD_WARNING, HubServer
from huggingface_hub import HfApi, ModelCard
from tiny import VOCAB_SIZE, tiny_tokenizer
from tiny_training import tiny_blocks
from torch import Tensor
from transformers import TrainingArguments

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM, AlibiGPTForSequenceClassification
from hf_alibi.cli import evaluate
from hf_alibi.cli import publish as publish_command
from hf_alibi.errors import UserError
from hf_alibi.hub.checkpoints import load_causal_lm
from hf_alibi.hub.model_card import PLOT_NAME
from hf_alibi.hub.publish import publish, reload_and_compare
from hf_alibi.training.trainer import train

pytestmark = IGNORE_UPLOAD_WARNING

INPUT_IDS = [list(range(5, 45)), list(range(105, 145))]


def new_model(seed: int) -> AlibiGPTForCausalLM:
    """Returns a model of 1.7 MB."""
    torch.manual_seed(seed)
    special = {"bos_token_id": tiny_tokenizer().bos_token_id, "eos_token_id": tiny_tokenizer().eos_token_id}
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "training_length": 32}
    config = AlibiGPTConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **shape, **special)
    return AlibiGPTForCausalLM(config).eval()


def trained_model(folder: Path, **arguments: Any) -> AlibiGPTForCausalLM:
    """Returns a model after two steps of Trainer, which saves it in `folder` with all its other files."""
    blocks = tiny_blocks(folder.with_suffix(".txt"))
    model = new_model(seed=1)
    model.config.pad_token_id = model.generation_config.pad_token_id = tiny_tokenizer().pad_token_id
    args = TrainingArguments(str(folder), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True, **arguments)
    train(model, tiny_tokenizer(), blocks, args)
    return model.eval()


class World:
    """All models of these tests, published once, and loaded once in a new process.

    `tester/books` gets a trained model from Trainer (commit `by_trainer`), then the same from hf_alibi publish, in
    shards, with an evaluation and a connection that is lost once (commit `by_script`), then another on branch `v2`.
    `tester/pushed` gets the trained model by its `push_to_hub`, `tester/classifier` one with a head.
    """

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub = hub
        self.crater = folder / "crater"
        run = folder / "books"
        self.model = trained_model(run, push_to_hub=True, hub_model_id="tester/books", hub_private_repo=True)
        self.by_trainer = hub.repositories["tester/books"].refs["main"]
        write_bomb(run / "training_args.bin", self.crater)

        evaluation = [
            "--validation_file",
            str(run.with_suffix(".txt")),
            "--lengths",
            "16",
            "64",
            "--max_tokens",
            "128",
        ]
        evaluation += ["--model_name_or_path", str(run), "--output_prefix", str(run / "by_length"), "--device", "cpu"]
        evaluate.main(evaluation)
        arguments = ["--folder", str(run), "--repo_id", "tester/books", "--private", "--max_shard_size", "1MB"]
        arguments += [
            "--evaluation",
            str(run / "by_length.json"),
            "--evaluation_text",
            "foxes",
            "--language",
            "en",
            "de",
        ]
        requests_before = len(hub.requests)
        with redirect_stdout(io.StringIO()) as self.listing:
            publish_command.main([*arguments, "--dry_run"])
        self.requests_of_dry_run = hub.requests[requests_before:]
        hub.drop("/lfs/")
        with redirect_stdout(io.StringIO()) as self.output:
            publish_command.main(arguments)
        self.by_script = hub.repositories["tester/books"].refs["main"]

        self.other = new_model(seed=2)
        for part in (self.other, tiny_tokenizer()):
            part.save_pretrained(folder / "other")
        publish(folder / "other", "tester/books", revision="v2")
        self.model.push_to_hub("tester/pushed")
        self.classifier = AlibiGPTForSequenceClassification(self.model.config).eval()
        self.classifier.push_to_hub("tester/classifier", private=True)
        self.found = self.load(folder / "fresh")

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Returns the outputs of a new process that loads from the Hub."""
        folder.mkdir()
        requests = {
            "main": Request("tester/books", INPUT_IDS, caches=["dynamic", "static"]),
            "commit": Request("tester/books", INPUT_IDS, revision=self.by_script),
            "trainer": Request("tester/books", INPUT_IDS, revision=self.by_trainer),
            "branch": Request("tester/books", INPUT_IDS, revision="v2"),
            "decoder": Request("tester/books", INPUT_IDS, auto_class="AutoModel"),
            "pushed": Request("tester/pushed", INPUT_IDS),
            "classifier": Request("tester/classifier", INPUT_IDS, auto_class="AutoModelForSequenceClassification"),
        }
        return run_fresh(requests, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as monkeypatch, HubServer() as server:
        server.connect(folder / "home", monkeypatch)
        yield World(server, folder)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model(torch.tensor(INPUT_IDS))[0]


def greedy(model: AlibiGPTForCausalLM) -> Tensor:
    input_ids = torch.tensor(INPUT_IDS)
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("name", ["main", "commit", "trainer", "pushed", "branch", "decoder", "classifier"])
def test_a_process_without_the_package_gets_the_same_outputs(world: World, name: str) -> None:
    model = {"branch": world.other, "decoder": world.model.model, "classifier": world.classifier}.get(
        name, world.model
    )
    kind = "last_hidden_state" if name == "decoder" else "logits"
    assert world.found[f"{name} is remote"]
    torch.testing.assert_close(world.found[f"{name} {kind}"], outputs(model), rtol=0, atol=1e-5)


def test_other_logits_would_be_noticed(world: World) -> None:
    with pytest.raises(UserError, match=r"was uploaded, but the logits of .* differ by .* of the largest"):
        reload_and_compare(HfApi(), "tester/books", world.by_script, world.other, tiny_tokenizer())


@pytest.mark.slow
def test_a_commit_that_cannot_be_loaded_would_be_noticed(world: World) -> None:
    first, *_ = world.hub.repositories["tester/books"].commits
    with pytest.raises(UserError, match=rf"but {first} cannot be loaded: ValueError: Unrecognized") as error_info:
        reload_and_compare(HfApi(), "tester/books", first, world.other, tiny_tokenizer())
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_gets_the_same_continuation(world: World, cache: str) -> None:
    assert torch.equal(world.found[f"main {cache}"], greedy(world.model))


def test_with_the_package_no_remote_code_is_needed(world: World) -> None:
    model, tokenizer = load_causal_lm("tester/books", device="cpu")
    assert type(model) is AlibiGPTForCausalLM
    assert torch.equal(outputs(model), outputs(world.model))
    assert torch.equal(greedy(model), greedy(world.model))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_three_ways_to_publish_upload_the_same_model(world: World) -> None:
    by_trainer = world.hub.files("tester/books", world.by_trainer)
    by_model = world.hub.files("tester/pushed")
    by_script = world.hub.files("tester/books")
    code = {name for name in by_script if name.endswith(".py")}
    assert {"configuration_alibi_gpt.py", "modeling_alibi_gpt.py"} <= code
    for name in {"config.json", "generation_config.json", *code}:
        assert by_trainer[name] == by_model[name] == by_script[name]
    assert by_trainer["model.safetensors"] == by_model["model.safetensors"]
    assert by_trainer["tokenizer.json"] == by_script["tokenizer.json"]


@pytest.mark.parametrize("in_use", [False, True], ids=["new folder", "folder in use"])
def test_saving_with_an_upload_includes_the_code(world: World, tmp_path: Path, in_use: bool) -> None:
    name = f"tester/saved-{in_use}".lower()
    if in_use:
        world.model.save_pretrained(tmp_path)
        (tmp_path / "modeling_alibi_gpt.py").write_text("# Old code.\n")
    world.model.save_pretrained(tmp_path, push_to_hub=True, repo_id=name)
    # Transformers splits this path, so it must be a string.
    world.model.config.save_pretrained(str(tmp_path / "config"), push_to_hub=True, repo_id=f"{name}-config")
    by_script, uploaded = world.hub.files("tester/books"), world.hub.files(name)
    code = {file: content for file, content in by_script.items() if file.endswith(".py")}
    assert {file: content for file, content in uploaded.items() if file.endswith(".py")} == code
    of_config = world.hub.files(f"{name}-config")
    assert {file: content for file, content in of_config.items() if file.endswith(".py")} == code


def test_shards_take_the_place_of_earlier_weights(world: World) -> None:
    present = world.hub.files("tester/books")
    shards = sorted(name for name in present if name.endswith(".safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert set(json.loads(present["model.safetensors.index.json"])["weight_map"].values()) == set(shards)
    assert all(len(present[name]) < 1_000_000 for name in shards)


def test_no_pickle_travels_or_is_read(world: World) -> None:
    assert "training_args.bin" not in world.hub.files("tester/books", world.by_trainer)
    assert "training_args.bin" not in world.hub.files("tester/books")
    assert not world.crater.exists()


def test_a_dry_run_lists_what_is_uploaded_later_and_uses_no_network(world: World) -> None:
    *rows, total = world.listing.getvalue().splitlines()
    listed = {row.split()[1]: int(row.split()[0].replace(",", "")) for row in rows}
    uploaded = {name: len(content) for name, content in world.hub.files("tester/books").items()}
    del uploaded[".gitattributes"]
    assert listed == uploaded
    assert total.split()[-2:] == ["for", "tester/books"]
    assert not world.requests_of_dry_run


def test_the_script_says_where_the_model_is_and_uploads_card_and_plot(world: World) -> None:
    assert f"tester/books at {world.by_script} loads in a new process" in world.output.getvalue()
    uploaded = world.hub.files("tester/books")
    card = ModelCard(uploaded["README.md"].decode())
    assert card.data.language == ["en", "de"]
    assert "| Steps | 2 |" in card.text
    assert f"]({PLOT_NAME})" in card.text
    assert uploaded[PLOT_NAME].startswith(b"\x89PNG")
    names = [result.metric_name for result in card.data.eval_results or []]
    assert names[::2] == ["perplexity at 16 tokens", "perplexity at 64 tokens"]


def test_repositories_are_private_and_every_request_was_understood(world: World) -> None:
    assert world.hub.repositories["tester/books"].private
    # The client asks this once a day. It does not concern the package.
    assert set(world.hub.unknown) <= {"GET /api/agent-harnesses"}
