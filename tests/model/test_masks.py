"""Masks: padding on the right and anywhere, in any dtype, and four dimensions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from document_cases import LENGTH, assert_close, each_backend, models_by_backend, no_grad, numbers, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_alibi import AlibiGPTForCausalLM


@pytest.fixture
def model_of(make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AlibiGPTForCausalLM]:
    return models_by_backend(make_model, monkeypatch)


# Number of tokens in each row of a batch with padding on the right.
PADDED = [LENGTH, 11, 4]


def right_padded() -> tuple[Tensor, Tensor]:
    return tokens(3), (torch.arange(LENGTH) < torch.tensor(PADDED)[:, None]).long()


@each_backend
@no_grad
def test_padding_before_a_token_sees_the_text_before_it(model_of: Any, backend: str) -> None:
    """If candidates follow padding, the last padding predicts their first token, as one padding token would."""
    model, (input_ids, mask) = model_of(backend), right_padded()
    candidates = tokens(3, 3)
    whole = torch.cat([input_ids, candidates], 1)
    logits = model(whole, attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1), use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(whole[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    rest = model(
        whole[:, 9:], attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1), past_key_values=cache
    ).logits
    for row, length in enumerate(PADDED):
        pad = [whole[row, LENGTH - 1 : LENGTH]] if length < LENGTH else []
        alone = torch.cat([whole[row, :length], *pad, whole[row, LENGTH:]])[None]
        alone_mask = torch.ones_like(alone)
        alone_mask[:, length : length + len(pad)] = 0
        model.config._attn_implementation = "eager"
        expected = model(alone, attention_mask=alone_mask, use_cache=False).logits[:, -4:]
        model.config._attn_implementation = backend
        assert_close(logits[row : row + 1, -4:], expected)
        assert_close(rest[row : row + 1, -4:], expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"assistant_model": None}], ids=str
)
@pytest.mark.parametrize("length", [11, 4])
def test_candidates_after_padding_give_the_tokens_of_greedy(
    model_of: Any, backend: str, settings: dict[str, Any], length: int
) -> None:
    model, input_ids = model_of("eager"), tokens()
    mask = (torch.arange(LENGTH) < length).long()[None]
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(input_ids, use_cache=False, **options)
    model.config._attn_implementation = backend
    if "assistant_model" in settings:
        settings = {"assistant_model": model}
    for given in ({}, {"past_key_values": DynamicCache(config=model.config)}):
        found = model.generate(input_ids, **given, **options, **settings)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.long, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@no_grad
def test_a_mask_of_any_dtype_hides_padding_anywhere_and_whole_rows(
    model_of: Any, backend: str, dtype: torch.dtype
) -> None:
    model, input_ids = model_of(backend), tokens(3)
    mask = torch.ones(3, LENGTH).index_fill(1, torch.tensor([3, 4, 9]), 0)
    mask[1] = 0
    logits = model(input_ids, attention_mask=mask.to(dtype), use_cache=False).logits
    assert logits.isfinite().all()
    for row in (0, 2):
        real = mask[row].bool()
        assert_close(logits[row : row + 1, real], model(input_ids[row : row + 1, real], use_cache=False).logits)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["boolean", "minus-infinity", "lowest"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4), (1, 4)], ids=str)
@no_grad
def test_a_mask_with_four_dimensions(
    model_of: Any, backend: str, static: bool, kind: str, shape: tuple[int, int]
) -> None:
    """It separates two documents. In some cases the pass is the second one with a cache."""
    model, input_ids, sizes = model_of(backend), tokens(2), [9, 8]
    expected = torch.cat([model(piece, use_cache=False).logits for piece in input_ids.split(sizes, 1)], 1)
    number = numbers(sizes)[0]
    visible = (number[:, None] == number) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible = visible.expand(*shape, -1, -1)
    hidden = -torch.inf if kind == "minus-infinity" else torch.finfo(torch.float32).min
    mask = visible if kind == "boolean" else torch.zeros(visible.shape).masked_fill(~visible, hidden)
    assert_close(model(input_ids, attention_mask=mask, use_cache=False).logits, expected)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3) if static else DynamicCache(config=model.config)
    room = 3 if static else 0
    value = False if kind == "boolean" else hidden
    model(input_ids[:, :7], past_key_values=cache)
    rows = torch.nn.functional.pad(mask[:, :, 7:], (0, room), value=value)
    assert_close(model(input_ids[:, 7:], attention_mask=rows, past_key_values=cache).logits, expected[:, 7:])
