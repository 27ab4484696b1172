"""Quantizers: a quantized model computes what a plain model with the same, rounded weights computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe, tokens
from torch import Tensor, nn


@torch.no_grad()
def check(
    quantized: nn.Module, books: str, dequantize: Callable[[nn.Module], Tensor], dtype: torch.dtype = torch.float32
) -> str:
    """Compares logits with those of a plain model with the dequantized weights, and returns a sentence on both.

    Quantized layers may compute in `dtype`. The tolerance is twice the error that the plain model makes in it.
    """
    plain = model_of(books)
    text = tokens(2, 90)
    original = plain(text).logits
    modules = dict(quantized.named_modules())
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            weight = dequantize(modules[name])
            assert not torch.equal(weight, linear.weight)
            linear.weight.copy_(weight)
    logits = quantized(text).logits.float()
    expected = plain(text).logits
    error = difference(logits, expected)
    tolerance = max(1e-5, 2 * difference(plain.to(dtype)(text).logits, expected))
    assert error < tolerance
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = 0
    batched = quantized(text, attention_mask=mask).logits[:1, 30:]
    assert difference(batched, quantized(text[:1, 30:]).logits) < tolerance
    rounding = difference(logits, original)
    return f"logits are those of the rounded weights to {error:.0e} (rounding itself: {rounding:.0e})"


def test_bitsandbytes(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional

    def dequantize(linear: Any) -> Tensor:
        return functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)

    model = cook(*recipe("4-bit"))["model"]
    # Its CPU kernel computes in bfloat16 where the CPU can.
    shown("bitsandbytes", "4-bit on the CPU: " + check(model, books, dequantize, torch.bfloat16))


def test_bitsandbytes_8_bit(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("bitsandbytes")
    (code,) = recipe("4-bit")
    model = cook(code.replace('load_in_4bit=True, bnb_4bit_quant_type="nf4"', "load_in_8bit=True"))["model"]

    def dequantize(linear: Any) -> Tensor:
        return linear.weight.data * linear.weight.SCB[:, None] / 127

    # It rounds the inputs of a layer to 8 bits, as bfloat16 does.
    what = check(model, books, dequantize, torch.bfloat16)
    shown("bitsandbytes", f"8-bit on the CPU: {what}")


def test_torchao(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("torchao")
    cook(*recipe("8-bit"))
    what = check(model_of("runs/books-int8"), books, lambda linear: linear.weight.dequantize())
    shown("torchao", f"int8, saved and loaded: {what}")


def test_torchao_4_bit(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("torchao")
    (code,) = recipe("8-bit")
    code = code.replace("Int8WeightOnlyConfig()", "IntxWeightOnlyConfig(torch.int4, PerGroup(32))")
    code = code.replace("import Int8WeightOnlyConfig", "import IntxWeightOnlyConfig, PerGroup")
    cook(code, torch=torch)
    what = check(model_of("runs/books-int8"), books, lambda linear: linear.weight.dequantize())
    shown("torchao", f"4-bit, saved and loaded: {what}")


def test_quanto(books: str, shown: Callable[[str, str], None]) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = model_of(books)
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    shown("optimum-quanto", "int8: " + check(model, books, lambda linear: linear.weight.dequantize()))
