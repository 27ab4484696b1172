"""Arguments that contradict each other, or that the model does not understand, are refused by name."""

from typing import Any

import pytest
import torch
from conftest import ModelFactory
from document_cases import LENGTH, SIZES, bounds, cached, no_grad, numbers, positions, tokens
from transformers import DynamicCache


@no_grad
def test_passes_that_leave_open_what_they_continue_are_refused(make_model: ModelFactory) -> None:
    model, more = make_model(), tokens(1, 3)
    cache = cached(model, seq_idx=numbers(SIZES))
    with pytest.raises(ValueError, match="holds several documents, and nothing says which"):
        model(more, past_key_values=cache)
    with pytest.raises(ValueError, match="seq_idx covers 3 tokens; it must cover the 17 cached and the 3 new ones"):
        model(more, past_key_values=cache, seq_idx=numbers([3]))
    with pytest.raises(ValueError, match=r"cu_seq_lens_k=\[0, 3\] must rise from 0 to 20.*cached ones included"):
        model(more, past_key_values=cache, **bounds([3]))
    rows = torch.cat([positions([LENGTH], 5), positions([LENGTH], 0)])
    cache = DynamicCache(config=model.config)
    model(tokens(2), position_ids=rows, past_key_values=cache)
    with pytest.raises(ValueError, match="begin with different position_ids in different rows"):
        model(tokens(2, 1), position_ids=torch.tensor([[22], [17]]), past_key_values=cache)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "positions-and-seq-idx": (
        {"position_ids": positions([9, 8], 0), "seq_idx": numbers([8, 9])},
        r"seq_idx and position_ids contradict.*row 0 begins at token 8 by seq_idx, but at token 0 by position_ids",
    ),
    "one-document-and-two": (
        {"position_ids": torch.arange(LENGTH)[None], "attention_mask": numbers([8, 9], 1)},
        "attention_mask and position_ids contradict each other",
    ),
    "mask-and-seq-idx": (
        {"attention_mask": numbers([8, 9], 1), "seq_idx": numbers([9, 8])},
        "attention_mask and seq_idx contradict each other",
    ),
    "lengths-and-positions": ({**bounds([9, 8]), "position_ids": positions([17], 0)}, "cu_seq_lens and position_ids"),
    "lengths-of-queries-and-keys": (
        {"cu_seq_lens_q": bounds([9, 8])["cu_seq_lens_q"], "cu_seq_lens_k": bounds([8, 9])["cu_seq_lens_k"]},
        r"cu_seq_lens_q=\[0, 9, 17\] and cu_seq_lens_k=\[0, 8, 17\] contradict each other",
    ),
    "longest": ({**bounds([9, 8]), "max_length_k": 8}, "max_length_k=8 contradicts cu_seq_lens_k: .* has 9 tokens"),
    "a-document-in-two-pieces": ({"attention_mask": torch.tensor([[1] * 8 + [2] * 8 + [1]])}, "must be contiguous"),
    "seq-idx-in-two-pieces": ({"seq_idx": torch.arange(LENGTH)[None] // 4 % 2}, "seq_idx has .* must be contiguous"),
    "four-dimensions": (
        {"attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), "seq_idx": numbers([8, 9])},
        "leave out seq_idx",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_refused(make_model: ModelFactory, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(tokens(), **arguments)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "lengths-too-short": (bounds([9, 7]), r"cu_seq_lens_q=\[0, 9, 16\] must rise from 0 to 17"),
    "lengths-of-queries-only": ({"cu_seq_lens_q": bounds([9, 8])["cu_seq_lens_q"]}, "Only one of cu_seq_lens_q and"),
    "lengths-as-a-list": ({"cu_seq_lens_q": [0, 17], "cu_seq_lens_k": [0, 17]}, "must be a tensor of integers"),
    "longest-only": ({"max_length_q": 9}, "need cu_seq_lens_q"),
    "seq-idx-too-short": ({"seq_idx": numbers([9, 7])}, "seq_idx covers 16 tokens"),
    "seq-idx-below-0": ({"seq_idx": numbers([9, 8]) - 1}, "seq_idx must not be negative"),
    "seq-idx-in-float": ({"seq_idx": numbers([9, 8]).float()}, r"must be a tensor of integers \[1 or 1, tokens\]"),
    "positions-without-batch": ({"position_ids": torch.arange(LENGTH)}, "position_ids must be a tensor of integers"),
    "positions-in-three-rows": ({"position_ids": positions([17], 0).repeat(3, 1)}, "position_ids must be a tensor"),
    "positions-too-many": ({"position_ids": torch.arange(18)[None]}, "has 18 columns; it must have 17"),
    "positions-that-jump": (
        {"position_ids": torch.arange(LENGTH)[None] + 9 * (torch.arange(LENGTH) > 5)},
        "jump to 15 at token 6 of row 0",
    ),
    "mask-as-a-list": ({"attention_mask": [[1] * LENGTH]}, "attention_mask must be a tensor.*not a list"),
    "mask-as-a-dict": ({"attention_mask": {"full_attention": None}}, "not a dict"),
    "mask-below-0": ({"attention_mask": torch.ones(1, LENGTH).index_fill(1, torch.tensor([0]), -7)}, "contains -7"),
    "mask-of-halves": ({"attention_mask": torch.full((1, LENGTH), 0.5)}, r"this one contains 0\.5"),
    "mask-with-three-dimensions": ({"attention_mask": torch.ones(1, LENGTH, LENGTH)}, r"it must be \[1, tokens\]"),
    "mask-of-too-many-heads": ({"attention_mask": torch.ones(1, 2, LENGTH, LENGTH).bool()}, "1 or 6 heads"),
    "mask-of-too-many-texts": ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH).bool()}, "1 or 1 texts"),
    "float-mask-of-ones": ({"attention_mask": torch.ones(1, 1, LENGTH, LENGTH).tril()}, "Make it boolean"),
    "kinds-of-tokens": (
        {"token_type_ids": torch.ones(1, LENGTH, dtype=torch.long)},
        "token_type_ids must be all zero",
    ),
    "encoder": ({"encoder_hidden_states": torch.ones(1, 3, 96)}, "does not know the argument encoder_hidden_states"),
    "encoder-mask": (
        {"encoder_attention_mask": torch.ones(1, 3)},
        "does not know the argument encoder_attention_mask",
    ),
    "head-mask": ({"head_mask": torch.ones(2, 6)}, "does not know the argument head_mask"),
    "position-bias": ({"position_bias": torch.ones(1, 6, LENGTH, LENGTH)}, "the argument position_bias"),
    "block-sequence-ids": ({"block_sequence_ids": numbers([9, 8])}, "the argument block_sequence_ids"),
    "both-directions": ({"is_causal": False}, "is_causal=False is not supported"),
    "cache-position": ({"cache_position": torch.arange(1, LENGTH + 1)}, "does not fit 17 new tokens after 0 cached"),
    "misspelt": ({"atention_mask": torch.ones(1, LENGTH)}, "atention_mask.*did you mean attention_mask"),
}


@pytest.mark.parametrize(("arguments", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_what_is_not_understood_is_refused_by_name(
    make_model: ModelFactory, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(tokens(), **arguments)


def test_a_block_mask_is_refused(make_model: ModelFactory) -> None:
    mask = torch.nn.attention.flex_attention.create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, "cpu")
    with pytest.raises(ValueError, match=r"attention_mask must be a tensor.*not a BlockMask"):
        make_model()(tokens(1, 128), attention_mask=mask)


@no_grad
def test_harmless_arguments_pass(make_model: ModelFactory) -> None:
    model, input_ids = make_model(), tokens()
    expected = model(input_ids).logits
    harmless = {
        "token_type_ids": torch.zeros_like(input_ids),
        "num_items_in_batch": 16,
        "output_attentions": False,
        "output_hidden_states": True,
        "return_dict": True,
        "is_causal": True,
        "cache_position": torch.arange(LENGTH),
        "special_tokens_mask": torch.zeros_like(input_ids),
        "head_mask": None,
        "encoder_hidden_states": None,
    }
    assert torch.equal(model(input_ids, **harmless).logits, expected)


@no_grad
def test_positions_that_a_cache_does_not_have_are_refused_with_a_mask_of_four_dimensions(
    make_model: ModelFactory,
) -> None:
    model = make_model()
    cache = cached(model)
    mask = torch.ones(1, 1, 2, LENGTH + 2, dtype=torch.bool).tril(LENGTH)
    for start in (LENGTH - 5, LENGTH + 1):
        with pytest.raises(ValueError, match="position_ids must continue at 17"):
            model(
                tokens(1, 2),
                attention_mask=mask,
                position_ids=start + torch.arange(2)[None],
                past_key_values=cache,
            )
