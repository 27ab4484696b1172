"""During training, every commit under every strategy holds only the files of the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_repository import File
from hub_server import IGNORE_UPLOAD_WARNING, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi
from tiny import VOCAB_SIZE, tiny_tokenizer
from tiny_training import tiny_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.errors import UserError
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig
from hf_alibi.training.packing import collate_blocks
from hf_alibi.training.safe_trainer import SafeTrainer
from hf_alibi.training.trainer import train

pytestmark = IGNORE_UPLOAD_WARNING

MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# The first bytes of a pickle, and of a file that torch saves.
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Yields an empty Hub. Only tokens that are passed as arguments can write to it."""
    with HubServer() as server:
        server.connect(tmp_path / "home", monkeypatch)
        monkeypatch.delenv("HF_TOKEN")
        yield server


def new_model(**kwargs: Any) -> AlibiGPTForCausalLM:
    torch.manual_seed(0)
    special = {"bos_token_id": tiny_tokenizer().bos_token_id, "eos_token_id": tiny_tokenizer().eos_token_id}
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AlibiGPTForCausalLM(AlibiGPTConfig(**special, **shape, **kwargs))


def arguments(folder: Path, strategy: str, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=3,
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="tester/run",
        hub_strategy=strategy,
        hub_token=WRITE_TOKEN,
        hub_always_push=True,
        report_to="tensorboard",
        **others,
    )


def new_trainer(folder: Path, args: TrainingArguments) -> SafeTrainer:
    return SafeTrainer(
        model=new_model(),
        args=args,
        train_dataset=tiny_blocks(folder / "text.txt")["train"],
        data_collator=collate_blocks,
        processing_class=tiny_tokenizer(),
    )


def is_code(path: str) -> bool:
    return path.endswith(".py")


def check_commit(files: dict[str, File]) -> None:
    """Checks that a commit holds no pickle and no token, and only model, tokenizer, code and card."""
    for path, file in files.items():
        assert not file.content.startswith(PICKLES), path
        assert WRITE_TOKEN.encode() not in file.content, path
        folder, _, name = path.rpartition("/")
        assert is_code(name) or name in MODEL | TOKENIZER | ({"README.md", ".gitattributes"} if not folder else set())


FOLDERS = {
    "end": [],
    "every_save": [],
    "checkpoint": ["last-checkpoint"],
    "all_checkpoints": ["checkpoint-1", "checkpoint-2", "checkpoint-3"],
}


@pytest.mark.parametrize("strategy", FOLDERS)
def test_every_commit_holds_the_model_alone(
    hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], strategy: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("private")
    train(
        new_model(), tiny_tokenizer(), tiny_blocks(tmp_path / "text.txt"), arguments(run, strategy, save_total_limit=1)
    )

    commits = hub.repositories["tester/run"].commits
    # One commit creates the repository, each checkpoint makes one, and publishing makes the last.
    assert len(commits) == (2 if strategy == "end" else 5)
    for files in commits.values():
        check_commit(files)
    last = hub.files("tester/run")
    assert sorted({path.rpartition("/")[0] for path in last} - {""}) == FOLDERS[strategy]
    assert last["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert "README.md" in last
    output = capfd.readouterr()
    assert WRITE_TOKEN not in output.out + output.err
    for path in run.rglob("*"):
        assert path.is_dir() or WRITE_TOKEN.encode() not in path.read_bytes(), path
    assert json.loads((run / "training_args.json").read_text())["hub_token"] == "<HUB_TOKEN>"


@pytest.mark.parametrize("folder", ["", "last-checkpoint"], ids=["root", "last checkpoint"])
def test_what_is_uploaded_while_training_loads_and_uses_its_cache(hub: HubServer, tmp_path: Path, folder: str) -> None:
    trainer = new_trainer(tmp_path, arguments(tmp_path / "run", "checkpoint"))
    trainer.train()
    first = list(hub.repositories["tester/run"].commits.values())[1]
    local = tmp_path / "loaded"
    local.mkdir()
    for path, file in first.items():
        if path.rpartition("/")[0] == folder:
            (local / Path(path).name).write_bytes(file.content)
    assert (local / "model.safetensors").read_bytes() == (tmp_path / "run/checkpoint-1/model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(local).config.use_cache
    assert AutoTokenizer.from_pretrained(local).get_vocab() == tiny_tokenizer().get_vocab()
    assert json.loads((local / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_stale_shards_leave_a_folder_that_is_uploaded_again(hub: HubServer, tmp_path: Path) -> None:
    api = HfApi(token=WRITE_TOKEN)
    api.create_repo("tester/run")
    for path in ("model-00001-of-00002.safetensors", "last-checkpoint/model-00001-of-00002.safetensors", "x/y.txt"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=path, repo_id="tester/run")
    new_trainer(tmp_path, arguments(tmp_path / "run", "checkpoint")).train()
    files = hub.files("tester/run")
    assert not [path for path in files if "-of-" in path]
    assert files["x/y.txt"] == b"old"


def test_push_to_hub_of_the_trainer_publishes(hub: HubServer, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, arguments(tmp_path / "run", "end"))
    trainer.train()
    with pytest.raises(UserError, match="takes commit_message, token and revision only, not dataset"):
        trainer.push_to_hub(dataset="books")
    # Like that of Trainer, this method also uploads.
    trainer.save_model()
    commits = list(hub.repositories["tester/run"].commits.values())
    assert "README.md" in commits[-1]
    for files in commits:
        check_commit(files)


def test_a_private_run_is_never_sent_to_a_public_repository(hub: HubServer, tmp_path: Path) -> None:
    HfApi(token=WRITE_TOKEN).create_repo("tester/run")
    args = arguments(tmp_path / "run", "every_save", hub_private_repo=True)
    with pytest.raises(UserError, match="tester/run is public; make it private"):
        train(new_model(), tiny_tokenizer(), tiny_blocks(tmp_path / "text.txt"), args)
    assert list(hub.files("tester/run")) == [".gitattributes"]


def test_what_cannot_be_published_is_refused_before_training(hub: HubServer, tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(SinusoidalGPTConfig(**shape))
    with pytest.raises(UserError, match="only AlibiGPTForCausalLM can be published, not Sinusoidal"):
        train(model, tiny_tokenizer(), tiny_blocks(tmp_path / "text.txt"), arguments(tmp_path / "run", "end"))
    assert not hub.repositories


def test_an_upload_that_fails_while_training_is_said(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.drop("/commit/")
    new_trainer(tmp_path, arguments(tmp_path / "run", "every_save")).train()
    assert "an upload to tester/run failed while training" in caplog.text
    assert "model.safetensors" in hub.files("tester/run")
