"""The loss in training is the same for one large batch as for several small ones, and is smoothed correctly."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from tiny import VOCAB_SIZE, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_alibi import (
    AlibiGPTConfig,
    AlibiGPTForCausalLM,
    AlibiGPTForMultipleChoice,
    AlibiGPTForQuestionAnswering,
    AlibiGPTForSequenceClassification,
    AlibiGPTForTokenClassification,
)
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM
from hf_alibi.training.packing import collate_blocks
from hf_alibi.training.trainer import train

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
BATCH, EPSILON = 8, 0.1
LENGTHS = [5, 17, 9, 3, 20, 11, 2, 7]
Rows = list[dict[str, Any]]


class OwnModel(AlibiGPTForCausalLM):
    """A model of a user's own, whose name says nothing."""


class OwnTagger(AlibiGPTForTokenClassification):
    """A model of a user's own, whose name says nothing."""


def random_ids(*shape: int, seed: int = 0, high: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(2, high, shape, generator=torch.Generator().manual_seed(seed))


def texts(labels: list[Any]) -> Rows:
    """Texts of different lengths, with these labels."""
    ids = [random_ids(length, seed=length).tolist() for length in LENGTHS]
    return [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def tags() -> Rows:
    return [row | {"labels": [id % 3 for id in row["input_ids"]]} for row in texts([None] * BATCH)]


def answers() -> Rows:
    """Texts of one length, because Trainer counts no items where there are no labels."""
    rows = random_ids(BATCH, 12).tolist()
    return [{"input_ids": row, "start_positions": i, "end_positions": i + 2} for i, row in enumerate(rows)]


def model_of(cls: type, **values: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        config = SinusoidalGPTConfig if issubclass(cls, SinusoidalGPTForCausalLM) else AlibiGPTConfig
        return cls(config(pad_token_id=tiny_tokenizer().pad_token_id, **(SHAPE | values)))

    return make


def padded_tags(rows: Rows) -> dict[str, Tensor]:
    batch = DataCollatorForTokenClassification(tiny_tokenizer(), label_pad_token_id=-100)(rows)
    return dict(batch)


def padded_texts(rows: Rows) -> dict[str, Tensor]:
    return dict(tiny_tokenizer().pad([dict(row) for row in rows], return_tensors="pt"))


def choices() -> Rows:
    """Three texts each, of which one is right. One row is not scored."""
    rows = texts([0] * BATCH)
    return [
        {"input_ids": [row["input_ids"] for row in three], "labels": label}
        for three, label in zip(zip(rows, rows[1:] + rows[:1], rows[2:] + rows[:2], strict=True),
                                [0, 1, 2, 1, -100, 2, 2, 1], strict=True)
    ]  # fmt: skip


def padded_choices(rows: Rows) -> dict[str, Tensor]:
    return dict(DataCollatorForMultipleChoice(tiny_tokenizer())(rows))


def blocks() -> Rows:
    return [{"input_ids": random_ids(length, seed=length).tolist()} for length in LENGTHS]


RANDOM = torch.Generator().manual_seed(3)
SEQUENCE = AlibiGPTForSequenceClassification
TASKS: dict[str, tuple[Callable[[], PreTrainedModel], Rows, Any]] = {
    "language model": (model_of(AlibiGPTForCausalLM), blocks(), collate_blocks),
    "sinusoidal": (model_of(SinusoidalGPTForCausalLM), blocks(), collate_blocks),
    "own language model": (model_of(OwnModel), blocks(), collate_blocks),
    "classes": (model_of(SEQUENCE, num_labels=3), texts([0, 1, 2, 1, 0, 2, 2, 1]), padded_texts),
    "classes not scored": (model_of(SEQUENCE, num_labels=3), texts([0, -100, 2, 1, -100, 2, 2, 1]), padded_texts),
    "numbers": (
        model_of(SEQUENCE, num_labels=1),
        texts(torch.randn(BATCH, generator=RANDOM).tolist()),
        padded_texts,
    ),
    "vectors": (
        model_of(SEQUENCE, num_labels=3, problem_type="regression"),
        texts(torch.randn(BATCH, 3, generator=RANDOM).tolist()),
        padded_texts,
    ),
    "several classes": (
        model_of(SEQUENCE, num_labels=3),
        texts(torch.randint(2, (BATCH, 3), generator=RANDOM).float().tolist()),
        padded_texts,
    ),
    "tags": (model_of(AlibiGPTForTokenClassification, num_labels=3), tags(), padded_tags),
    "own tagger": (model_of(OwnTagger, num_labels=3), tags(), padded_tags),
    "choices": (model_of(AlibiGPTForMultipleChoice), choices(), padded_choices),
    "answers": (model_of(AlibiGPTForQuestionAnswering), answers(), None),
}


def first_step(task: str, folder: Path, batch_size: int, accumulation: int) -> tuple[float, float]:
    """Returns the loss and the norm of the gradients of one step over all rows."""
    make, rows, collate = TASKS[task]
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        # So large that the norm is measured but nothing is clipped.
        max_grad_norm=1e9,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    collator = {} if collate is None else {"data_collator": collate}
    trainer = Trainer(make(), arguments, train_dataset=Dataset.from_list(rows), **collator)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return log["loss"], float(log["grad_norm"])


@pytest.mark.parametrize("task", TASKS)
def test_small_batches_make_the_step_of_a_large_one(task: str, tmp_path: Path) -> None:
    make, rows, collate = TASKS[task]
    whole = first_step(task, tmp_path, BATCH, 1)
    assert first_step(task, tmp_path, 2, 4) == pytest.approx(whole, rel=1e-4)
    if collate is not None:
        alone = make().train()(**collate(rows)).loss.item()
        assert whole[0] == pytest.approx(alone, rel=1e-4)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch.distributed
from test_losses import TASKS, first_step
results = {task: first_step(task, Path(sys.argv[1]), 2, 2) for task in TASKS}
if torch.distributed.get_rank() == 0:
    (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TWO_PROCESSES)
    here = Path(__file__).parent
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", program, tmp_path, here, here.parent]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, env=environment, timeout=300)
    results = json.loads((tmp_path / "results.json").read_text())
    for task, step in results.items():
        assert step == pytest.approx(first_step(task, tmp_path / "one", BATCH, 1), rel=1e-4), task


def smoothed(logits: Tensor, labels: Tensor) -> float:
    """Computes label smoothing by definition: all classes share `EPSILON` equally. Source: arXiv 1512.00567."""
    logs = logits.double().log_softmax(-1)[labels != -100]
    labels = labels[labels != -100]
    target = F.one_hot(labels, logs.shape[-1]) * (1 - EPSILON) + EPSILON / logs.shape[-1]
    return -(target * logs).sum(-1).mean().item()


def smoothing_trainer(model: nn.Module, folder: Path) -> Trainer:
    return Trainer(model, TrainingArguments(str(folder), label_smoothing_factor=EPSILON, use_cpu=True))


@torch.no_grad()
@pytest.mark.parametrize("task", ["language model", "sinusoidal", "own language model"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "class of FSDP"])
def test_label_smoothing_predicts_the_next_token(task: str, sharded: bool, tmp_path: Path) -> None:
    make, rows, collate = TASKS[task]
    model, batch = make(), collate(rows)
    # PyTorch's fully_shard gives a model a class of this name.
    if sharded:
        model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
    expected = smoothed(model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:])
    assert smoothing_trainer(model, tmp_path).compute_loss(model, dict(batch)).item() == pytest.approx(expected)


@torch.no_grad()
@pytest.mark.parametrize("task", ["classes", "classes not scored", "tags"])
def test_label_smoothing_of_classes_does_not_shift(task: str, tmp_path: Path) -> None:
    make, rows, collate = TASKS[task]
    model, batch = make(), collate(rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = smoothed(model(**inputs).logits, batch["labels"])
    assert smoothing_trainer(model, tmp_path).compute_loss(model, dict(batch)).item() == pytest.approx(expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_smooths_labels_of_the_next_token(compiled: bool, tmp_path: Path) -> None:
    make, rows, collate = TASKS["language model"]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        learning_rate=0,
        per_device_train_batch_size=BATCH,
        label_smoothing_factor=EPSILON,
        torch_compile=compiled,
        torch_compile_backend="eager" if compiled else None,
        use_cpu=True,
    )
    model, batch = make(), collate(rows)
    data = DatasetDict({"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows)})
    metrics = train(model, tiny_tokenizer(), data, arguments)
    with torch.no_grad():
        expected = smoothed(make()(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:])
    assert metrics["train_loss"] == pytest.approx(expected)
    assert metrics["eval_loss"] == pytest.approx(expected)


REMOTE = """
import logging, sys
import torch
import transformers
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.utils.logging import get_logger

class Errors(logging.Handler):
    def emit(self, record):
        raise RuntimeError(record.getMessage())

get_logger("transformers").addHandler(Errors(logging.ERROR))
folder = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.") and "hf_alibi" not in sys.modules
ids = torch.arange(3, 43)[None]
trainer = Trainer(model, TrainingArguments(folder + "/out", label_smoothing_factor=0.1, use_cpu=True))
with torch.no_grad():
    print(trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()}).item())
tokenizer = AutoTokenizer.from_pretrained(folder)
for task, auto in (("text-generation", None), ("text-classification", "AutoModelForSequenceClassification"),
                   ("token-classification", "AutoModelForTokenClassification")):
    if auto:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    pipeline(task, model=model, tokenizer=tokenizer)
"""


@pytest.mark.parametrize("positions", ["alibi", "sinusoidal"])
def test_label_smoothing_and_pipelines_without_the_package(tmp_path: Path, positions: str) -> None:
    task = {"alibi": "language model", "sinusoidal": "sinusoidal"}[positions]
    model, ids = TASKS[task][0]().eval(), torch.arange(3, 43)[None]
    model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    program = REMOTE if positions == "alibi" else REMOTE[: REMOTE.index("tokenizer =")]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = smoothed(model(ids).logits[:, :-1], ids[:, 1:])
    assert float(done.stdout.split()[0]) == pytest.approx(expected)


def test_pipelines_know_the_models(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny_tokenizer()
    for task, name in (
        ("text-generation", "sinusoidal"),
        ("text-generation", "own language model"),
        ("text-classification", "classes"),
        ("token-classification", "own tagger"),
    ):
        pipeline(task, model=TASKS[name][0](), tokenizer=tokenizer, device="cpu")
    assert "not supported" not in caplog.text
