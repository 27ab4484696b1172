"""Evaluation: lm-eval at lengths beyond the trained one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import TRAINING_LENGTH, model_of, recipe
from tiny import tiny_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog\n" * n for n in (9, 2, 30, 17)]


@torch.no_grad()
def log_probability(books: str, text: str) -> float:
    """Returns the log-probability of a text after the end token, read at once."""
    ids = torch.tensor([[tiny_tokenizer().eos_token_id, *tiny_tokenizer()(text).input_ids]])
    assert ids.shape[1] > TRAINING_LENGTH or text == TEXTS[1]
    loss = model_of(books)(ids, labels=ids).loss
    return -loss.item() * (ids.shape[1] - 1)


def test_lm_eval(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("lm_eval")
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": "texts.jsonl"},
        "test_split": "train",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    expected = -sum(log_probability(books, text) for text in TEXTS) / sum(map(len, TEXTS)) / math.log(2)
    (code,) = recipe("lm-eval beyond the trained length")
    code = code.replace("batch_size", "device='cpu', batch_size")
    for changed in (code, code.replace("max_length=8192, ", "").replace("batch_size=4", "batch_size=1")):
        results = cook(changed, tasks=[task])["results"]
        measured = results["texts"]["bits_per_byte,none"]
        assert measured == pytest.approx(expected, rel=1e-5)
    longest = max(len(tiny_tokenizer()(text).input_ids) for text in TEXTS)
    shown(
        "lm_eval",
        f"{measured:.4f} bits per byte, batched and single, texts up to {longest} tokens, trained length "
        f"{TRAINING_LENGTH}; the model itself says {expected:.4f}",
    )
