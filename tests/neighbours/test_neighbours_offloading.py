"""accelerate: weights that stay on the CPU or on disk until a layer needs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import TRAINING_LENGTH, difference, model_of, recipe, tokens

accelerate = pytest.importorskip("accelerate")


@torch.no_grad()
def check(model: Any, books: str) -> float:
    """Returns the largest error of logits, a padded text's among them, and checks that greedy answers are the same."""
    plain = model_of(books)
    text, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = 0
    error = difference(model.eval()(text).logits, plain(text).logits)
    padded = difference(model(text, attention_mask=mask).logits[:1, 30:], plain(text[:1, 30:]).logits)
    answer = model.generate(text, max_new_tokens=3 * TRAINING_LENGTH, do_sample=False)
    assert torch.equal(answer, plain.generate(text, max_new_tokens=3 * TRAINING_LENGTH, do_sample=False))
    return max(error, padded)


def test_cpu_and_disk(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    model = cook(*recipe("Weights on the CPU and on disk"))["model"]
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    error = check(model, books)
    assert error < 1e-5
    shown("accelerate", f"weights on the CPU and on disk: logits to {error:.0e}, and the same greedy answers")


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload"])
def test_every_weight(books: str, kind: str) -> None:
    model = model_of(books)
    folder = [str(Path("runs/offloaded"))] if kind == "disk_offload" else []
    getattr(accelerate, kind)(model, *folder, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert check(model, books) < 1e-5
