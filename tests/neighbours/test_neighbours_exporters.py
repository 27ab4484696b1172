"""ONNX: the exported programs run in ONNX Runtime, with other sizes than those they were exported with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe, tokens
from tiny import tiny_tokenizer
from transformers import DynamicCache

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@torch.no_grad()
def test_onnx(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    model, tokenizer = model_of(books), tiny_tokenizer()
    (code,) = recipe("ONNX", "converting.md")
    program = cook(code, model=model, tokenizer=tokenizer)["program"]
    text, mask = tokens(3, 200), torch.ones(3, 200, dtype=torch.long)
    mask[0, :70] = 0
    expected = model(text, attention_mask=mask, use_cache=False).logits
    cache, errors = DynamicCache(config=model.config), []
    for name, start, end in (("prefill", 0, 199), ("decode", 199, 200)):
        part = text[:, start:end]
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        outputs = program.runners[name](
            input_ids=part, attention_mask=mask[:, :end], position_ids=positions, cache=cache
        )
        cache, shown_tokens = outputs.cache, mask[:, start:end].bool()
        errors.append(difference(outputs.logits[shown_tokens], expected[:, start:end][shown_tokens]))
    assert max(errors) < 1e-5
    shown("onnxruntime", f"prompt and step, 3 texts of 200 tokens, one padded left: logits to {max(errors):.0e}")
