"""Old checkpoints get the present code, in a folder and on the Hub, and nothing else in them changes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import edit_config, pickle_weights, save_baseline
from hub_server import IGNORE_UPLOAD_WARNING, READ_TOKEN, HubServer
from huggingface_hub import HfApi, constants
from many_files import write_many_files
from tiny import save_checkpoint

from hf_alibi import AlibiGPTForCausalLM, AlibiGPTForSequenceClassification
from hf_alibi.cli import refresh as refresh_command
from hf_alibi.errors import UserError
from hf_alibi.hub.refresh import new_code, refresh

pytestmark = IGNORE_UPLOAD_WARNING

FIRST_RELEASE = Path(__file__).parents[1] / "fixtures" / "first-release"

# Is added to the old code, and records the tokens that it sees.
SPY = """
import os
from pathlib import Path as _Path
_Path({crater!r}).write_text(repr(sorted(name for name in os.environ if "TOKEN" in name)))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make_old(folder: Path, crater: Path) -> None:
    """Changes the code of a checkpoint to that of another release: many files, and one has another name."""
    write_many_files(folder)
    (folder / "cache_names.py").rename(folder / "names_of_caches.py")
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace("from .cache_names import", "from .names_of_caches import"))
    with (folder / "modeling_alibi_gpt.py").open("a") as file:
        file.write(SPY.format(crater=str(crater)))
    (folder / "handler.py").write_text("# The author's own, for an endpoint.\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForImageToImage"] = "names_of_caches.Gone"
    config["auto_map"]["AutoModelForMaskedLM"] = "handler.Own"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Returns a checkpoint with old code that runs."""
    folder = save_checkpoint(tmp_path / "books")
    make_old(folder, tmp_path / "crater")
    return folder


@pytest.mark.parametrize("name", ["qk-norm", "layer-norm"])
def test_a_checkpoint_of_the_first_release_gets_the_present_code(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    shutil.copytree(FIRST_RELEASE / name, folder)
    before = contents(folder)
    change = refresh(folder)
    assert change is not None
    after = contents(folder)
    assert after | {"config.json": b""} == before | new_code() | {"config.json": b""}
    configs = [json.loads(files["config.json"]) for files in (before, after)]
    # The first release had no class that chooses among texts.
    assert configs[1]["auto_map"].pop("AutoModelForMultipleChoice") == "modeling_alibi_gpt.AlibiGPTForMultipleChoice"
    assert configs[0] == configs[1]
    assert "outputs differ from those of the package's own model by" in capsys.readouterr().out
    assert refresh(folder) is None
    assert f"{folder} already has the code of hf_alibi" in capsys.readouterr().out


def test_old_code_is_replaced_and_other_files_stay(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    before = contents(old)
    refresh_command.main([str(old), "--dry-run", "--trust-remote-code"])
    assert contents(old) == before
    listing = capsys.readouterr().out
    assert "  write   modeling_alibi_gpt.py\n" in listing
    assert "  delete  names_of_caches.py\n" in listing
    assert "  delete  windows.py\n" in listing
    assert "outputs differ from those of the old code by 0 of the largest" in listing
    assert (tmp_path / "crater").read_text() == "[]", "the old code saw a token"

    (tmp_path / "crater").unlink()
    refresh_command.main([str(old)])
    assert not (tmp_path / "crater").exists(), "the old code ran without being trusted"
    assert "outputs differ from those of the package's own model by" in capsys.readouterr().out
    after = contents(old)
    kept = {name for name in before if not name.endswith(".py") and name != "config.json"} | {"handler.py"}
    assert after.keys() == kept | new_code().keys() | {"config.json"}
    assert {"model.safetensors", "handler.py", "tokenizer.json"} <= kept
    assert all(after[name] == before[name] for name in kept)
    configs = [json.loads(files["config.json"]) for files in (before, after)]
    assert configs[1]["auto_map"].pop("AutoModelForMaskedLM") == "handler.Own"
    assert configs[1].pop("auto_map") == AlibiGPTForCausalLM._auto_map
    assert configs[0].pop("auto_map")
    assert configs[0] == configs[1]


def test_old_code_that_fails_is_no_obstacle(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (old / "modeling_alibi_gpt.py").open("a") as file:
        file.write("\nfrom transformers import NameOfOtherDays\n")
    refresh(old, trust_remote_code=True)
    output = capsys.readouterr().out
    assert "the old code does not run: ImportError: cannot import name 'NameOfOtherDays'" in output
    assert "outputs differ from those of the package's own model by" in output
    assert new_code().items() <= contents(old).items()


def test_other_outputs_are_refused_and_nothing_changes(old: Path) -> None:
    file = old / "modeling_alibi_gpt.py"
    file.write_text(file.read_text().replace("logits = self.lm_head(", "logits = 1.001 * self.lm_head("))
    before = contents(old)
    with pytest.raises(
        UserError, match=r"outputs differ from those of the old code by 0\.001 of the largest; nothing"
    ):
        refresh(old, trust_remote_code=True)
    assert contents(old) == before


@pytest.mark.slow
def test_a_classifier_is_compared_by_its_own_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(tmp_path / "classifier")
    AlibiGPTForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    refresh(folder)
    assert "outputs differ from those of the package's own model by" in capsys.readouterr().out
    assert new_code().items() <= contents(folder).items()


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "baseline": (save_baseline, {}, "is a 'sinusoidal_gpt' checkpoint; only alibi_gpt can be refreshed"),
    "head": (lambda folder: edit_config(folder, architectures=["Other"]), {}, r"holds \['Other'\]; expected one of"),
    "field": (lambda folder: edit_config(folder, num_key_value_heads=3), {}, "cannot share 3 key-value"),
    "pickle": (pickle_weights, {}, "pickled weights can run code and are never read"),
    "weights": (lambda folder: edit_config(folder, num_hidden_layers=3), {}, "lacks weights that its config asks for"),
    "revision": (lambda folder: None, {"revision": "v2"}, "is a folder; revision and create_pr are for repositories"),
}


@pytest.mark.parametrize(("tamper", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_refreshed_is_refused_in_a_line(
    old: Path, tamper: Callable[[Path], Any], arguments: dict[str, Any], message: str
) -> None:
    tamper(old)
    before = contents(old)
    with pytest.raises(UserError, match=message) as error_info:
        refresh(old, **arguments)
    assert "\n" not in str(error_info.value)
    assert contents(old) == before


# The Hub.


@pytest.fixture
def hub(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Yields a Hub with the old checkpoint as `tester/books`."""
    with HubServer() as server:
        server.connect(tmp_path / "home", monkeypatch)
        HfApi().create_repo("tester/books")
        HfApi().upload_folder(repo_id="tester/books", folder_path=old)
        server.uploads.clear()
        yield server


def test_a_repository_gets_one_commit_or_a_pull_request(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    before, commits = hub.files("tester/books"), len(hub.repositories["tester/books"].commits)
    requests = len(hub.requests)
    refresh_command.main(["tester/books", "--dry_run", "--token", READ_TOKEN])
    assert not [request for request in hub.requests[requests:] if not request.startswith(("GET", "HEAD"))]
    assert "  delete  names_of_caches.py\n" in capsys.readouterr().out

    refresh_command.main(["tester/books", "--create_pr"])
    assert "discussions/1" in capsys.readouterr().out
    assert hub.files("tester/books") == before
    refreshed = hub.files("tester/books", "refs/pr/1")
    refresh_command.main(["tester/books"])
    assert hub.files("tester/books") == refreshed
    assert len(hub.repositories["tester/books"].commits) == commits + 2
    assert not hub.uploads, "weights are not sent again"
    code = {name: content for name, content in refreshed.items() if name.endswith(".py")}
    assert code == new_code() | {"handler.py": before["handler.py"]}
    for name in before:
        if not name.endswith(".py") and name != "config.json":
            assert refreshed[name] == before[name]
    # The client asks this once a day. It does not concern the package.
    assert set(hub.unknown) <= {"GET /api/agent-harnesses"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "tester/missing"}, "there is no repository tester/missing, or the token may not see it"),
        ({"checkpoint": "not a name"}, "not a name: Repo id must"),
        ({"revision": "v9"}, "tester/books has no such revision"),
        ({"token": "hf_wrong"}, "tester/books: the Hub answers 401"),
        ({"token": "hf_torn\n"}, "tester/books"),
    ],
    ids=["missing", "name", "revision", "token", "torn token"],
)
def test_what_the_hub_refuses_is_said_in_a_line_without_the_token(
    hub: HubServer, arguments: dict[str, Any], message: str
) -> None:
    before = hub.files("tester/books")
    with pytest.raises(UserError, match=message) as error_info:
        refresh(**({"checkpoint": "tester/books"} | arguments))
    assert "\n" not in str(error_info.value)
    assert "hf_wrong" not in str(error_info.value)
    assert "hf_torn" not in str(error_info.value)
    assert hub.files("tester/books") == before


def test_offline_and_unreachable_are_told_apart(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the download of tester/books broke off: .*refused"):
        refresh("tester/books")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="tester/books cannot be reached: HF_HUB_OFFLINE is set"):
        refresh("tester/books")
