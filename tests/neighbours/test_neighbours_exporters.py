"""ONNX and OpenVINO: the exported programs run in their runtimes, with other sizes than those of the export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe, tokens
from tiny import tiny_tokenizer
from transformers import DynamicCache

from hf_alibi import AlibiGPTForCausalLM


@torch.no_grad()
def check(program: Any, model: AlibiGPTForCausalLM) -> str:
    """Compares a prompt and a step with the model without a cache, and returns a sentence on the error."""
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
    return f"prompt and step, 3 texts of 200 tokens, one padded left: logits to {max(errors):.0e}"


def test_onnx(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = model_of(books)
    (code,) = recipe("ONNX", "converting.md")
    shown("onnxruntime", check(cook(code, model=model, tokenizer=tiny_tokenizer())["program"], model))


def test_openvino(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("openvino")
    from transformers.exporters import ExportedModel

    model = model_of(books)
    (code,) = recipe("OpenVINO")
    cook(code, model=model, tokenizer=tiny_tokenizer())
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    program = ExportedModel.from_pretrained("runs/books-openvino", device="cpu", config=precision)
    shown("openvino", "saved and loaded: " + check(program, model))
