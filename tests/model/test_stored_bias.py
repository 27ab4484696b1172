"""The bias that `sdpa` stores for all layers on a GPU. These tests make the CPU do the same."""

from typing import Any

import pytest
import torch
from conftest import ModelFactory
from test_attention import padding
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model import causal, sdpa, tiles

LENGTH = 111
INPUTS: dict[str, dict[str, Tensor]] = {
    "whole-texts": {},
    **{f"{side}-padding": {"attention_mask": padding(side, LENGTH)} for side in ("left", "right", "hole")},
    "documents": {"position_ids": torch.cat([torch.arange(40), torch.arange(LENGTH - 40)]).expand(3, -1)},
    "own-mask": {"attention_mask": torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril().triu(-30)},
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The biases that are stored while a test runs, each once."""
    stored: dict[int, Tensor] = {}
    original = sdpa._stored_bias

    def recorded(*args: Any) -> Tensor:
        bias = original(*args)
        stored[id(bias)] = bias
        found[:] = stored.values()
        return bias

    found: list[Tensor] = []
    monkeypatch.setattr(sdpa, "WITHOUT_STORED_BIAS", ())
    monkeypatch.setattr(sdpa, "_stored_bias", recorded)
    return found


def results(model: AlibiGPTForCausalLM, backend: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Returns the logits of tokens and the gradients."""
    model.set_attn_implementation(backend)
    model.zero_grad()
    input_ids = torch.randint(3, 97, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids, use_cache=False, **inputs).logits
    mask = inputs.get("attention_mask", torch.ones(3, LENGTH))
    logits = logits[mask.bool()] if mask.dim() == 2 else logits
    (logits.double() ** 2).sum().backward()
    return [logits.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (12, 12)])
def test_logits_and_gradients(
    made: list[Tensor], make_model: ModelFactory, heads: int, kv_heads: int, name: str
) -> None:
    model = make_model(num_attention_heads=heads, num_key_value_heads=kv_heads).double()
    expected, found = (results(model, backend, INPUTS[name]) for backend in ("eager", "sdpa"))
    assert len(made) == 1, "the layers of a pass share one bias"
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["left-padding", "hole-padding"])
def test_16_bits_have_finite_results(
    made: list[Tensor], make_model: ModelFactory, name: str, dtype: torch.dtype
) -> None:
    found = results(make_model().to(dtype), "sdpa", INPUTS[name])
    assert [bias.dtype for bias in made] == [dtype]
    assert all(values.isfinite().all() for values in [*made, *found])


@pytest.mark.parametrize("static", [False, True], ids=["dynamic-cache", "static-cache"])
def test_decoding_with_a_cache(made: list[Tensor], make_model: ModelFactory, static: bool) -> None:
    model = make_model(num_key_value_heads=2)
    input_ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = StaticCache(model.config, max_cache_len=LENGTH + 9) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = input_ids.split([LENGTH - 9, 8, 1], dim=1)
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1)
        model.set_attn_implementation("eager")
        expected = model(input_ids, use_cache=False).logits
    assert [bias.shape[-2:] for bias in made] == [(102, 102), (8, 110), (1, 111)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_long_text_has_one_bias_too(made: list[Tensor], make_model: ModelFactory) -> None:
    model, input_ids = make_model(), torch.randint(3, 97, (1, 1100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        expected = model(input_ids, use_cache=False).logits
    assert [bias.shape for bias in made] == [(1, 6, 1100, 1100)]
    assert made[0].stride(2) % sdpa.ALIGNMENT == 0
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", INPUTS)
def test_no_call_has_a_larger_bias_than_allowed(
    make_model: ModelFactory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, *others: Any, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        largest.append(attn_mask.untyped_storage().nbytes() // attn_mask.element_size())
        return original(query, key, *others, attn_mask=attn_mask, **kwargs)

    model = make_model().double()
    expected = results(model, "eager", INPUTS[name])
    monkeypatch.setattr(sdpa, "is_one_operator", lambda *_: False)
    monkeypatch.setattr(causal, "is_one_operator", lambda *_: False)
    monkeypatch.setattr(tiles, "CALL_BIAS", 18 * LENGTH * 7)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for actual, exact in zip(results(model, "sdpa", INPUTS[name]), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12 * max(1.0, exact.abs().max().item()))
    assert 0 < max(largest) <= 18 * LENGTH * 7


@pytest.mark.parametrize("fields", [{"alibi_slopes_trainable": True}, {}], ids=["trained-slopes", "too-large"])
def test_other_biases_are_not_stored(
    made: list[Tensor], make_model: ModelFactory, fields: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "STORED_BIAS", 10**6 if fields else 6 * LENGTH * LENGTH - 1)
    results(make_model(**fields), "sdpa", {})
    assert made == []


def test_checkpointed_training(made: list[Tensor], make_model: ModelFactory) -> None:
    model = make_model().train()
    expected = results(model, "sdpa", {})
    # Before Transformers 5.24 its name was gradient_checkpointing_enable.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for actual, exact in zip(results(model, "sdpa", {}), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-5 * exact.abs().max().item())
    assert len(made) == 2
