"""ExecuTorch: the exported program runs in its runtime. The export takes a minute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe, tokens
from tiny import tiny_tokenizer

pytest.importorskip("executorch")


@torch.no_grad()
def test_executorch(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    from transformers.exporters import ExportedModel

    model = model_of(books)
    names = cook(*recipe("ExecuTorch"), model=model, tokenizer=tiny_tokenizer())
    assert names["logits"].shape[:2] == names["inputs"].input_ids.shape
    program = ExportedModel.from_pretrained("runs/books-executorch")
    text, mask = tokens(3, 200), torch.ones(3, 200, dtype=torch.long)
    mask[0, :70] = 0
    logits = program(input_ids=text, attention_mask=mask).logits
    error = difference(logits[mask.bool()], model(text, attention_mask=mask).logits[mask.bool()])
    assert error < 1e-5
    shown("executorch", f"saved and loaded: 3 texts of 200 tokens, one padded left: logits to {error:.0e}")
