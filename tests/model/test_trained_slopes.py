"""Trained slopes keep float32 precision when the weights are cast to another dtype."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from hf_alibi import AlibiGPTForCausalLM


@pytest.fixture
def model(make_model: ModelFactory) -> AlibiGPTForCausalLM:
    """A model whose slopes have many significant digits, so that rounding would change them."""
    made = make_model(alibi_slopes_trainable=True, num_attention_heads=12)
    with torch.no_grad():
        made.model.bias_log_slopes.add_(torch.linspace(-0.1, 0.3, 12))
    return made


def assert_slopes_are(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def slopes(decoder: Any) -> Tensor:
    return decoder.slopes(decoder.embed_tokens.weight)


WAYS: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to(torch.bfloat16),
    "to-dtype-and-device": lambda model: model.to("cpu", torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "there-and-back": lambda model: model.half().float(),
    "copied": lambda model: copy.deepcopy(model).bfloat16(),
    "as-part": lambda model: torch.nn.ModuleList([model]).bfloat16()[0],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_casting(model: AlibiGPTForCausalLM, way: Callable[[Any], Any], tmp_path: Path) -> None:
    """Slopes keep their precision when the model is cast, and when it is saved afterwards."""
    expected = slopes(model.model).clone()
    model(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    cast = way(model)
    assert_slopes_are(slopes(cast.model), expected)
    gradient = cast.model.bias_log_slopes.grad
    # A copy has no gradient.
    assert gradient is None or gradient.dtype == torch.float32
    cast(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    cast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == cast.dtype
    assert_slopes_are(slopes(loaded.model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoModelForTokenClassification])
@pytest.mark.filterwarnings("ignore:Some weights")
def test_loading(model: AlibiGPTForCausalLM, auto: Any, dtype: Any, tmp_path: Path) -> None:
    expected = slopes(model.model)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert_slopes_are(slopes(getattr(loaded, "model", loaded)), expected)


def test_a_new_model_in_16_bits(model: AlibiGPTForCausalLM) -> None:
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert_slopes_are(slopes(made.model), torch.tensor(model.config.slopes))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_fixed_slopes(
    model: AlibiGPTForCausalLM, make_model: ModelFactory, implementation: str
) -> None:
    """They are equal to the last bit, in bfloat16 and under autocast."""
    fixed = make_model(num_attention_heads=12, alibi_slopes=slopes(model.model).tolist())
    fixed.load_state_dict(model.state_dict(), strict=False)
    input_ids = torch.randint(3, 97, (1, 200))
    for one in (fixed, model):
        one.set_attn_implementation(implementation)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(input_ids).logits, fixed(input_ids).logits)
        assert torch.equal(model.bfloat16()(input_ids).logits, fixed.bfloat16()(input_ids).logits)


def test_slopes_that_have_been_rounded_are_refused(model: AlibiGPTForCausalLM) -> None:
    rounded = {"model.bias_log_slopes": model.model.bias_log_slopes.bfloat16()}
    with pytest.raises(ValueError, match="rounds them by up to 2%"):
        torch.func.functional_call(model, rounded, (torch.arange(5)[None],))
