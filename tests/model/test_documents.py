"""Documents in a row: every way to describe them, in every backend, with and without a cache.

The reference is each document alone. Weights are large, so that a token which sees another document changes visibly.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from test_flash import flash_attn_func, flash_attn_varlen_func
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    modeling_flash_attention_utils,
)

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model.documents import NOTE
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM

SIZES = [5, 1, 4, 7]
LENGTH = sum(SIZES)
flex = pytest.param(
    "flex_attention",
    marks=[
        # It is slow because kernels are compiled.
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on the CPU needs a C++ compiler"),
        pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    ],
)
each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2", flex])
no_grad = torch.no_grad()


@pytest.fixture
def model_of(make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AlibiGPTForCausalLM]:
    """Returns a model with this backend. FlashAttention gets the kernels of its tests and needs no package."""

    def make(backend: str) -> AlibiGPTForCausalLM:
        model = make_model(num_attention_heads=4, hidden_size=64)
        kernels = (flash_attn_func, flash_attn_varlen_func), None
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: kernels)
        if backend == "flash_attention_2":
            model.to(torch.bfloat16)
        model.config._attn_implementation = backend
        return model

    return make


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Asserts equality up to the rounding of the model's dtype in two layers."""
    tolerance = 0.03 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def alone(model: AlibiGPTForCausalLM, input_ids: Tensor, sizes: list[int]) -> Tensor:
    """Returns the logits of each document alone, `[1, tokens, vocab_size]`."""
    return torch.cat([model(piece, use_cache=False).logits for piece in input_ids.split(sizes, 1)], 1)


def numbers(sizes: list[int], start: int = 0) -> Tensor:
    return torch.repeat_interleave(torch.arange(start, start + len(sizes)), torch.tensor(sizes))[None]


def positions(sizes: list[int], *starts: int) -> Tensor:
    """Returns the positions of documents that begin at `starts` in turn."""
    return torch.cat([torch.arange(size) + starts[i % len(starts)] for i, size in enumerate(sizes)])[None]


def bounds(sizes: list[int], past: int = 0) -> dict[str, Any]:
    """Returns cumulative lengths. The first `past` tokens are cached."""
    of_keys = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    of_queries = (of_keys - past).clamp(min=0)
    longest = {"max_length_q": int(of_queries.diff().max()), "max_length_k": max(sizes)}
    return {"cu_seq_lens_q": of_queries, "cu_seq_lens_k": of_keys, **longest}


WAYS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "positions-from-0": lambda sizes: {"position_ids": positions(sizes, 0)},
    "positions-from-1": lambda sizes: {"position_ids": positions(sizes, 1)},
    "positions-from-2": lambda sizes: {"position_ids": positions(sizes, 2)},
    "positions-from-anywhere": lambda sizes: {"position_ids": positions(sizes, 57, 3, 2, 0)},
    "positions-and-ones": lambda sizes: {
        "position_ids": positions(sizes, 2),
        "attention_mask": torch.ones(1, sum(sizes), dtype=torch.long),
    },
    "mask-of-numbers": lambda sizes: {"attention_mask": numbers(sizes, 1)},
    "mask-of-numbers-in-float": lambda sizes: {"attention_mask": numbers(sizes, 4).float()},
    "seq-idx": lambda sizes: {"seq_idx": numbers(sizes).int()},
    "cumulative-lengths": bounds,
    "seq-idx-and-positions-that-jump": lambda sizes: {
        "position_ids": positions(sizes, 7, 50, 100, 300),
        "seq_idx": numbers(sizes),
    },
    "all-at-once": lambda sizes: {
        "position_ids": positions(sizes, 0),
        "attention_mask": numbers(sizes, 1),
        "seq_idx": numbers(sizes),
        **bounds(sizes),
    },
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def part(arguments: dict[str, Any], sizes: list[int], start: int, end: int) -> dict[str, Any]:
    """Returns the arguments of a pass over the tokens from `start` to `end`. Earlier tokens are cached."""
    result = {}
    for name, value in arguments.items():
        if name == "position_ids":
            result[name] = value[:, start:end]
        elif name in ("attention_mask", "seq_idx"):
            result[name] = value[:, :end]
    if "cu_seq_lens_q" in arguments:
        kept, total = [], 0
        for size in sizes:
            kept.append(min(size, end - total))
            total += kept[-1]
            if total == end:
                break
        result |= bounds(kept, start)
    return result


@each_backend
@each_way
@no_grad
def test_documents_in_one_pass(model_of: Any, backend: str, way: Callable) -> None:
    model, input_ids = model_of(backend), tokens()
    expected = alone(model, input_ids, SIZES)
    assert (model(input_ids, use_cache=False).logits - expected).abs().max() > 0.1 * expected.abs().max()
    assert_close(model(input_ids, use_cache=False, **way(SIZES)).logits, expected)
    assert_close(model(input_ids, use_cache=True, **way(SIZES)).logits, expected)


PIECES = {"within-a-document": [3, 5, 1, 8], "at-borders": [5, 1, 4, 7], "token-by-token": [1] * LENGTH}


@each_backend
@each_way
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
@no_grad
def test_documents_with_a_cache(model_of: Any, backend: str, way: Callable, static: bool, pieces: list[int]) -> None:
    model, input_ids = model_of(backend), tokens()
    expected, arguments = alone(model, input_ids, SIZES), way(SIZES)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3) if static else DynamicCache(config=model.config)
    found, start = [], 0
    for size in pieces:
        given = part(arguments, SIZES, start, start + size)
        found.append(model(input_ids[:, start : start + size], past_key_values=cache, **given).logits)
        start += size
    assert_close(torch.cat(found, 1), expected)


ROWS = [[5, 1, 4, 7], [12], [2, 2, 2]]


def padded(side: str) -> tuple[Tensor, list[slice], dict[str, dict[str, Any]]]:
    """Three rows of documents with padding: tokens, a mask of real tokens, and the ways to describe them."""
    real = []
    ways: dict[str, list[Tensor]] = {"mask": [], "ones": [], "numbers": [], "positions": []}
    for sizes in ROWS:
        length = sum(sizes)
        left = {"left": LENGTH - length, "right": 0, "both": (LENGTH - length) // 2}[side]
        real.append(slice(left, left + length))
        row = {name: torch.zeros(1, LENGTH, dtype=torch.long) for name in ways}
        row["mask"][:, real[-1]], row["ones"][:, real[-1]] = numbers(sizes, 1), 1
        row["numbers"][:, real[-1]] = numbers(sizes)
        row["numbers"][:, left + length :] = len(sizes) - 1
        row["positions"][:, real[-1]] = positions(sizes, 2)
        for name, value in row.items():
            ways[name].append(value)
    mask, ones, seq_idx, position_ids = (torch.cat(rows) for rows in ways.values())
    encodings = {
        "mask-of-numbers": {"attention_mask": mask},
        "positions-and-mask": {"attention_mask": ones, "position_ids": position_ids},
        "positions-and-boolean-mask": {"attention_mask": ones.bool(), "position_ids": position_ids},
        "seq-idx-and-mask": {"attention_mask": ones, "seq_idx": seq_idx},
        "positions-and-numbers": {"attention_mask": mask, "position_ids": position_ids, "seq_idx": seq_idx},
    }
    return tokens(3), real, encodings


@each_backend
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", list(padded("left")[2]))
@no_grad
def test_documents_and_padding(model_of: Any, backend: str, side: str, name: str) -> None:
    model, (input_ids, real, ways) = model_of(backend), padded(side)
    whole = model(input_ids, use_cache=False, **ways[name]).logits
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    for end in (4, 9, 10, LENGTH):
        given = part(ways[name], [], start, end)
        pieces.append(model(input_ids[:, start:end], past_key_values=cache, **given).logits)
        start = end
    for row, sizes in enumerate(ROWS):
        expected = alone(model, input_ids[row : row + 1, real[row]], sizes)
        assert_close(whole[row : row + 1, real[row]], expected)
        assert_close(torch.cat(pieces, 1)[row : row + 1, real[row]], expected)


def cached(model: AlibiGPTForCausalLM, **arguments: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache, **arguments)
    return cache


@no_grad
def test_a_cache_remembers_with_which_position_its_last_document_begins(make_model: ModelFactory) -> None:
    """A position alone does not show how far back a document reaches that did not begin at 0."""
    model, more = make_model(), tokens(1, 3)
    expected = model(torch.cat([tokens()[:, -7:], more], 1)).logits[:, -3:]
    for start in (0, 2, 30):
        cache = cached(model, position_ids=positions(SIZES, start))
        going_on = start + 7 + torch.arange(3)[None]
        assert_close(model(more, position_ids=going_on, past_key_values=cache).logits, expected)
        cache.crop(-3)
        assert_close(model(more, position_ids=going_on, past_key_values=cache).logits, expected)
        fresh = model(more, position_ids=positions([3], start), past_key_values=cache).logits
        assert_close(fresh, model(more).logits)


@no_grad
def test_a_cache_in_use_again_has_forgotten(make_model: ModelFactory) -> None:
    model = make_model()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    model(tokens(), position_ids=positions(SIZES, 2), past_key_values=cache)
    assert getattr(cache, NOTE) == (2, True)
    cache.reset()
    expected = model(torch.cat([tokens(), tokens(1, 3)], 1)).logits
    assert_close(model(tokens(), past_key_values=cache).logits, expected[:, :LENGTH])
    assert_close(model(tokens(1, 3), past_key_values=cache).logits, expected[:, LENGTH:])


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


@pytest.mark.parametrize(
    "settings",
    [
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {},
    ],
    ids=["lengths", "seq-idx", "all", "positions"],
)
@no_grad
def test_what_transformers_flattens(make_model: ModelFactory, settings: dict[str, bool]) -> None:
    model, input_ids = make_model(), tokens()
    rows = [{"input_ids": piece[0].tolist()} for piece in input_ids.split(SIZES, 1)]
    batch = DataCollatorWithFlattening(**settings)(rows)
    assert_close(model(**batch).logits, alone(model, input_ids, SIZES))


def test_trainer_gets_the_same_loss_from_every_way(make_model: ModelFactory, tmp_path: Path) -> None:
    rows = [{"input_ids": tokens(1, 5 + i)[0].tolist()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    losses = []
    for settings in (
        {},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
    ):
        collator = DataCollatorWithFlattening(**settings)
        trainer = Trainer(make_model(), arguments, collator, train_dataset=rows, eval_dataset=rows)
        losses.append([trainer.train().training_loss, trainer.evaluate()["eval_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    fresh = Trainer(make_model(), arguments, DataCollatorWithFlattening(return_seq_idx=True), eval_dataset=rows[:4])
    total = sum(
        fresh.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        for ids in (torch.tensor([row["input_ids"]]) for row in rows[:4])
    )
    alone = total / sum(len(row["input_ids"]) - 1 for row in rows[:4])
    assert fresh.evaluate()["eval_loss"] == pytest.approx(alone, rel=1e-5)


@each_way
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_generation_goes_on_in_the_last_document(make_model: ModelFactory, way: Callable, settings: dict) -> None:
    model = make_model()
    if way is WAYS["seq-idx-and-positions-that-jump"]:
        # `generate` passes only positions on.
        with pytest.raises(ValueError, match="position_ids jump to 50"):
            model.generate(tokens(), max_new_tokens=1, **way(SIZES))
        return
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    expected = model.generate(tokens()[:, -7:], **settings)[0, 7:]
    for cache_implementation in (None, "dynamic", "static"):
        if cache_implementation == "static" and "prompt_lookup_num_tokens" in settings:
            # Transformers refuses this combination.
            continue
        chosen = {} if settings.get("use_cache") is False else {"cache_implementation": cache_implementation}
        found = model.generate(tokens(), **settings, **chosen, **way(SIZES))
        assert torch.equal(found[0, LENGTH:], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_with_documents_and_padding(make_model: ModelFactory, side: str) -> None:
    model, (input_ids, real, ways) = make_model(), padded(side)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(input_ids, **ways["mask-of-numbers"], **options)[:, LENGTH:]
    for row, sizes in enumerate(ROWS):
        start = real[row].stop - sizes[-1]
        mask = torch.ones(1, LENGTH - start, dtype=torch.long)
        # The text ends in padding, and continues from there.
        mask[:, sizes[-1] :] = 0
        alone = model.generate(input_ids[row : row + 1, start:], attention_mask=mask, **options)
        assert torch.equal(found[row], alone[0, LENGTH - start :])


@pytest.fixture
def sinusoidal() -> SinusoidalGPTForCausalLM:
    torch.manual_seed(0)
    config = SinusoidalGPTConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    return SinusoidalGPTForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["mask-of-numbers", "seq-idx", "cumulative-lengths", "all-at-once"])
@no_grad
def test_sinusoids_begin_again_with_each_document(sinusoidal: SinusoidalGPTForCausalLM, name: str) -> None:
    expected = alone(sinusoidal, tokens(), SIZES)
    assert_close(sinusoidal(tokens(), **WAYS[name](SIZES)).logits, expected)


@no_grad
def test_position_ids_choose_the_sinusoids(sinusoidal: SinusoidalGPTForCausalLM) -> None:
    given = sinusoidal(tokens(), position_ids=positions(SIZES, 2)).logits
    pieces = tokens().split(SIZES, 1)
    expected = [sinusoidal(piece, position_ids=positions([piece.shape[1]], 2)).logits for piece in pieces]
    assert_close(given, torch.cat(expected, 1))
    assert (given - alone(sinusoidal, tokens(), SIZES)).abs().max() > 1e-3 * given.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@no_grad
def test_sinusoids_do_not_count_padding(sinusoidal: SinusoidalGPTForCausalLM, side: str) -> None:
    input_ids, real, ways = padded(side)
    logits = sinusoidal(input_ids, **ways["mask-of-numbers"]).logits
    for row, sizes in enumerate(ROWS):
        expected = alone(sinusoidal, input_ids[row : row + 1, real[row]], sizes)
        assert_close(logits[row : row + 1, real[row]], expected)


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


@pytest.mark.parametrize("name", ["positions-from-0", "positions-from-2", "mask-of-numbers", "seq-idx"])
# Dynamo fails if a warning is an error.
@pytest.mark.filterwarnings("default")
@no_grad
def test_documents_in_a_compiled_model(make_model: ModelFactory, name: str) -> None:
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in (SIZES, [3, 9]):
        input_ids = tokens(1, sum(sizes))
        logits = compiled(input_ids, use_cache=False, **WAYS[name](sizes)).logits
        assert_close(logits, alone(model, input_ids, sizes))


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
