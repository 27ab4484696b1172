"""TRL: what its trainers compute in the first step, when the right number is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from recipes import model_of, recipe
from tiny import tiny_tokenizer
from torch.nn.functional import softplus

pytest.importorskip("trl")

TEXTS = [("the quick brown fox " * n).strip() for n in (2, 9, 4, 30, 6, 3, 14, 5)]
# Settings of the run, not of the method.
QUICK = {"use_cpu": True, "max_steps": 2, "report_to": "none", "save_strategy": "no", "bf16": False}


def quick(code: str, **more: Any) -> str:
    """Returns the recipe with a short run."""
    settings = ", ".join(f"{name}={value!r}" for name, value in (QUICK | more).items())
    before, call, after = code.partition("Config(")
    assert call
    return f"{before}{call}{after.replace(')', f', {settings})', 1)}"


@torch.no_grad()
def mean_loss(books: str, texts: list[str]) -> float:
    """Returns the loss of the texts one by one, per token."""
    model, total, count = model_of(books), 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tiny_tokenizer()(text).input_ids, tiny_tokenizer().eos_token_id]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_packing(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    (code,) = recipe("SFT with packing")
    texts = Dataset.from_dict({"text": TEXTS})
    names = cook(quick(code, eval_strategy="no", learning_rate=0.0), texts=texts)
    trainer = names["trainer"]
    assert len(trainer.train_dataset) < len(TEXTS)
    # One batch, because the trainer takes the mean over batches.
    trainer.args.per_device_eval_batch_size = 64
    packed, expected = trainer.evaluate()["eval_loss"], mean_loss(books, TEXTS)
    assert packed == pytest.approx(expected, rel=1e-5)
    shown("trl", f"SFT: the loss of packed texts, {packed:.4f}, is that of the texts alone, {expected:.4f}")


def test_only_the_assistant(books: str, shown: Callable[[str, str], None]) -> None:
    from trl import SFTConfig, SFTTrainer

    chat = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
    arguments = SFTConfig("runs/chat", assistant_only_loss=True, **QUICK)
    trainer = SFTTrainer(books, arguments, train_dataset=Dataset.from_dict({"messages": [chat] * 4}))
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    assert tiny_tokenizer().decode(labels[labels != -100]) == "brown fox" + tiny_tokenizer().eos_token
    trainer.train()
    shown("trl", "SFT: `assistant_only_loss` learns the assistant's words and the end token, nothing else")


def test_dpo(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    rows = {"prompt": TEXTS[:4], "chosen": [" jumps"] * 4, "rejected": [" over the lazy"] * 4}
    names = cook(quick(*recipe("DPO"), learning_rate=1e-3), preferences=Dataset.from_dict(rows))
    first, second = (entry["loss"] for entry in names["trainer"].state.log_history[:2])
    # The model is its own reference in the first step.
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert second < first
    shown("trl", f"DPO: the first loss, {first:.5f}, is ln 2, and the next is less, {second:.5f}")


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_rewarded(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], method: str) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(text.count("e")) for text in completions]

    prompts = Dataset.from_dict({"prompt": TEXTS})
    (code,) = recipe("GRPO") if method == "GRPO" else recipe("RLOO")
    code = quick(code, learning_rate=1e-3, per_device_train_batch_size=4)
    log = cook(code, reward=reward, prompts=prompts)["trainer"].state.log_history
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] > 1e-6
    shown(
        "trl", f"{method}: the KL from the reference is {log[0]['kl']:.0e} in the first step, then {log[1]['kl']:.0e}"
    )


@torch.no_grad()
def log_probability(books: str, prompt: str, answer: str) -> float:
    """Returns the log-probability of an answer and the end token after it."""
    ids = torch.tensor([[*tiny_tokenizer()(prompt + answer).input_ids, tiny_tokenizer().eos_token_id]])
    start = len(tiny_tokenizer()(prompt).input_ids)
    scores = model_of(books)(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return scores.gather(1, ids[0, start:, None]).sum().item()


def test_kto(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    answers = [" jumps", " over the lazy"] * 2
    rows = {"prompt": TEXTS[:4], "completion": answers, "label": [True, False] * 2}
    names = cook(quick(*recipe("KTO"), learning_rate=1e-3), judged=Dataset.from_dict(rows))
    first, second = names["trainer"].state.log_history[:2]
    # The model is its own reference in the first step, so each answer has the loss 1 - sigmoid(0).
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert second["loss"] < 0.49
    good, bad = (
        sum(log_probability(books, rows["prompt"][i], answers[i]) for i in picked) / 2 for picked in ((0, 2), (1, 3))
    )
    assert first["logps/chosen"] == pytest.approx(good, rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(bad, rel=1e-5)
    shown("trl", f"KTO: the first loss, {first['loss']:.5f}, is a half, and the next is less, {second['loss']:.5f}")


def test_reward_model(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    rows = {"prompt": TEXTS[:4], "chosen": [" jumps"] * 4, "rejected": [" over the lazy"] * 4}
    code = quick(*recipe("Reward model"), learning_rate=0.0)
    trainer = cook(code, preferences=Dataset.from_dict(rows))["trainer"]
    model, end = trainer.model.eval(), tiny_tokenizer().eos_token_id

    @torch.no_grad()
    def rewards(side: str) -> torch.Tensor:
        texts = [prompt + answer for prompt, answer in zip(rows["prompt"], rows[side], strict=True)]
        ids = [torch.tensor([[*tiny_tokenizer()(text).input_ids, end]]) for text in texts]
        return torch.cat([model(text).logits[0] for text in ids])

    expected = softplus(rewards("rejected") - rewards("chosen")).mean().item()
    loss = trainer.state.log_history[0]["loss"]
    assert type(model).__name__ == "AlibiGPTForSequenceClassification"
    assert loss == pytest.approx(expected, rel=1e-5)
    shown("trl", f"reward model: the loss of a padded batch, {loss:.5f}, is that of single texts, {expected:.5f}")
