"""The metric of the `evaluate` library gives the same results as the functions that it calls."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_alibi.errors import UserError
from hf_alibi.evaluation.metric import Perplexity
from hf_alibi.evaluation.perplexity import bits_per_byte, encode_stream, token_nats
from hf_alibi.hub.checkpoints import load_causal_lm

TEXTS = ["the quick brown fox jumps over the lazy dog", "the lazy dog jumps over the fox"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the metric must not use the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def metric(tmp_path: Path) -> Perplexity:
    return Perplexity(cache_dir=str(tmp_path))


@pytest.mark.parametrize("stride", [None, 5], ids=["no overlap", "stride 5"])
def test_texts_are_scored_as_one_stream(metric: Perplexity, tiny_checkpoint: Path, stride: int | None) -> None:
    model, tokenizer = load_causal_lm(tiny_checkpoint, device="cpu")
    result = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, max_length=16, stride=stride)
    input_ids = encode_stream(tokenizer, TEXTS)
    nats = token_nats(model, input_ids, 16, stride)
    assert result == {
        "nats": pytest.approx(nats.mean().item()),
        "perplexity": pytest.approx(nats.mean().exp().item()),
        "num_targets": len(input_ids) - 1,
        "bits_per_byte": pytest.approx(bits_per_byte(nats, input_ids[1:], tokenizer)),
    }


def test_token_ids_need_no_tokenizer(metric: Perplexity, tiny_checkpoint: Path) -> None:
    model, _ = load_causal_lm(tiny_checkpoint, device="cpu")
    documents = [[5, 6, 7, 8], [9, 10]]
    # The window is longer than all documents together.
    result = metric.compute(predictions=documents, model=model, max_length=1024)
    nats = token_nats(model, torch.tensor([5, 6, 7, 8, 9, 10]), 5)
    assert result == {"nats": nats.mean().item(), "perplexity": nats.mean().exp().item(), "num_targets": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": TEXTS}, "texts need a tokenizer"),
        ({"predictions": [[5]]}, "needs at least 2 tokens"),
        ({"predictions": [[5, 6, 290]]}, "beyond the model's vocabulary"),
    ],
    ids=["no tokenizer", "one token", "unknown token"],
)
def test_bad_input_is_refused(
    metric: Perplexity, tiny_checkpoint: Path, arguments: dict[str, Any], message: str
) -> None:
    model, _ = load_causal_lm(tiny_checkpoint, device="cpu")
    with pytest.raises(UserError, match=message):
        metric.compute(model=model, max_length=8, **arguments)
