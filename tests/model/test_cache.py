"""The windowed cache: it drops keys, and gives the same results as a cache that keeps them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import LENGTH, SHAPES, STEEP, STEPS, each_step, in_steps, tokens
from conftest import ModelFactory
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_alibi import AlibiGPTForCausalLM, WindowedCache
from hf_alibi.model import cache, tiles
from hf_alibi.model.alibi import alibi_bias, bias_view, ring_line

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings with few spare slots, each for a few heads."""
    monkeypatch.setattr(cache, "SPARE", 5)
    monkeypatch.setattr(tiles, "SHARED_KEYS", 12)


def windowed(model: AlibiGPTForCausalLM) -> WindowedCache:
    made = model.model.windowed_cache()
    assert made is not None
    return made


def assert_logits_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def held(past: WindowedCache) -> int:
    """Returns the number of keys for which the first layer has slots."""
    return sum(ring.keys.shape[1] * ring.keys.shape[2] for ring in past.layers[0].buffers)


@pytest.mark.parametrize("length", [1, 7, 25, 26, 27, 31, 60, 100])
@pytest.mark.parametrize("queries", [1, 2, 6])
def test_ring_line_is_the_bias_of_every_key_in_the_window(length: int, queries: int) -> None:
    if queries > length:
        pytest.skip("more queries than tokens")
    slopes, window, capacity = torch.tensor([0.5, 0.1], dtype=torch.float64), 20, 26
    slots = min(length, capacity)
    corner = capacity - 1 - (length - 1) % capacity
    found = bias_view(ring_line(slopes, window, capacity), slice(0, 2), queries, slots, corner).flip(2)

    newest = length - 1
    key_positions = torch.tensor([newest - (newest - slot) % capacity for slot in range(slots)])[None]
    query_positions = torch.arange(length - queries, length)[None]
    distance = query_positions[0, :, None] - key_positions
    expected = alibi_bias(slopes, query_positions, key_positions)
    expected = expected.masked_fill((distance < 0) | (distance > window), -torch.inf)
    torch.testing.assert_close(found, expected)


@each_step
@each_shape
def test_decoding_equals_the_full_forward(make_model: ModelFactory, shape: dict[str, Any], steps: list[int]) -> None:
    model = make_model(**shape)
    input_ids = tokens()
    past = windowed(model)
    logits = in_steps(model, input_ids, steps, past)
    with torch.no_grad():
        assert_logits_close(logits, model(input_ids, use_cache=False).logits)
    assert past.get_seq_length() == LENGTH
    assert past.layers[0].keys is None, "the text is still held as a whole"


@each_step
def test_left_padding(make_model: ModelFactory, steps: list[int]) -> None:
    model = make_model(**SHAPES["6-heads-unsorted"])
    input_ids = tokens(batch=4)
    mask = torch.ones_like(input_ids)
    for row, padding in enumerate([0, 3, 40, 99]):
        mask[row, :padding] = 0
    logits = in_steps(model, input_ids, steps, windowed(model), mask)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits
    assert_logits_close(logits[mask == 1], expected[mask == 1])


@each_step
def test_documents(make_model: ModelFactory, steps: list[int]) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens(batch=1)
    position_ids = torch.cat([torch.arange(n) for n in (30, 57, 8, 55)])[None]
    logits = in_steps(model, input_ids, steps, windowed(model), position_ids=position_ids)
    with torch.no_grad():
        assert_logits_close(logits, model(input_ids, position_ids=position_ids, use_cache=False).logits)


def test_held_keys_are_few_and_constant(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    past = windowed(model)
    in_steps(model, tokens(1, 500), [100] * 5, past)
    after_500 = [ring.keys.data_ptr() for ring in past.layers[0].buffers], held(past)
    in_steps(model, tokens(1, 900), [1] * 400, past)
    assert ([ring.keys.data_ptr() for ring in past.layers[0].buffers], held(past)) == after_500
    windows = past.layers[0].windows
    assert sum(windows) < held(past) <= sum(windows) + 4 * (cache.SPARE + 1) + tiles.SHARED_KEYS


def test_short_texts_are_held_as_a_whole(make_model: ModelFactory) -> None:
    # With the paper's slopes, only the steepest heads can drop any of 150 keys.
    model = make_model()
    past = windowed(model)
    in_steps(model, tokens(), [100, 50], past)
    assert past.layers[0].keys.shape == (2, 6, LENGTH, 16)
    assert past.layers[0].values.shape == (2, 6, LENGTH, 16)


def test_bfloat16_is_as_accurate_as_a_plain_cache(make_model: ModelFactory) -> None:
    exact = make_model(**SHAPES["6-heads-unsorted"]).double()
    model = make_model(**SHAPES["6-heads-unsorted"]).bfloat16()
    exact.load_state_dict(model.state_dict())
    input_ids = tokens()
    with torch.no_grad():
        expected = exact(input_ids, use_cache=False).logits
    steps = STEPS["prompt, then tokens"]
    plain = (in_steps(model, input_ids, steps, DynamicCache(config=model.config)) - expected).abs().max()
    assert (in_steps(model, input_ids, steps, windowed(model)) - expected).abs().max() <= 1.2 * plain


def test_tokens_can_be_taken_back(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens()
    past = windowed(model)
    in_steps(model, input_ids, [100], past)
    wrong = torch.full((2, 12), 5)
    for size, keep in [(3, 1), (5, 0), (4, 4), (1, 0)]:
        done = past.get_seq_length()
        guess = torch.cat([input_ids[:, : done + keep], wrong], 1)
        in_steps(model, guess, [size], past)
        past.crop(keep - size)
        assert past.get_seq_length() == done + keep
    rest = LENGTH - past.get_seq_length()
    logits = in_steps(model, input_ids, [1] * rest, past)
    with torch.no_grad():
        assert_logits_close(logits, model(input_ids, use_cache=False).logits[:, -rest:])


@pytest.mark.parametrize("prompt", [20, 100])
def test_any_number_of_tokens_can_be_taken_back_while_the_past_is_recorded(
    make_model: ModelFactory, prompt: int
) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens(length=300)
    past = windowed(model)
    past.activate_past_recording()
    in_steps(model, input_ids, [prompt], past)
    past.crop(0)
    done = prompt
    for steps in ([30], [1] * 25, [4, 40, 1]):
        in_steps(model, torch.full((2, 300), 5), steps, past)
        past.crop(-sum(steps))
        assert past.get_seq_length() == done
        in_steps(model, input_ids, [20], past)
        past.crop(0)
        done += 20
    logits = in_steps(model, input_ids, [1] * 50, past)
    with torch.no_grad():
        assert_logits_close(logits, model(input_ids[:, : done + 50], use_cache=False).logits[:, -50:])
    fresh = windowed(model)
    in_steps(model, input_ids, [done + 50], fresh)
    past.crop(0)
    assert held(past) == held(fresh), "what was kept for taking back is still there"


def test_taking_back_what_is_gone_is_refused(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    past = windowed(model)
    in_steps(model, tokens(), [LENGTH], past)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        past.crop(-20)
    assert past.get_seq_length() == LENGTH
    with pytest.raises(ValueError, match="such as -3 for three tokens; got 3"):
        past.crop(3)


@pytest.mark.parametrize("taken", [LENGTH, LENGTH + 7])
@pytest.mark.parametrize("prompt", [20, LENGTH])
def test_taking_back_everything_leaves_an_empty_cache(make_model: ModelFactory, prompt: int, taken: int) -> None:
    """As with a DynamicCache, even if keys have been dropped. The batch size may then change."""
    model = make_model(**SHAPES["4-heads"])
    past, plain = windowed(model), DynamicCache(config=model.config)
    # There is no token to remove yet. The DynamicCache of Transformers 5.19 fails here.
    past.crop(-3)
    for either in (past, plain):
        in_steps(model, tokens(), [prompt], either)
        either.crop(-taken)
        assert either.get_seq_length() == 0
        assert either.get_mask_sizes(5, 0) == (5, 0)
    logits = in_steps(model, tokens(), STEPS["chunks"], past)
    with torch.no_grad():
        assert_logits_close(logits, model(tokens(), use_cache=False).logits)


def test_what_a_cache_says_of_itself_is_what_a_dynamic_cache_says(make_model: ModelFactory) -> None:
    """Before the first token, in the middle, and after a reset."""
    model = make_model(**SHAPES["4-heads"])
    plain = DynamicCache(config=model.config)
    past = windowed(model)

    def said(either: Any) -> list[Any]:
        return [
            len(either),
            either.get_seq_length(),
            either.get_seq_length(1),
            either.get_query_offset(),
            either.get_mask_sizes(3, 1),
            either.get_max_length(),
            either.is_compileable,
            either.is_croppable,
            either.is_sliding,
            either.is_linear,
            # Transformers 5.19 has no such methods.
            getattr(either, "is_dummy", None),
            either.is_recording_past(0) if hasattr(either, "is_recording_past") else None,
            either.is_initialized,
            either.batch_size,
            [layer.is_initialized for layer in either.layers],
        ]

    sizes: dict[str, Any] = {"batch_size": 2, "num_heads": 4, "head_dim": 24, "dtype": torch.float32, "device": "cpu"}
    steps: list[Callable[[Any], Any]] = [
        lambda either: None,
        lambda either: either.early_initialization(**sizes),
        lambda either: in_steps(model, tokens(), [100, 1], either),
        lambda either: either.crop(0),
        lambda either: either.crop(-2),
        lambda either: either.reorder_cache(torch.tensor([1, 0])),
        lambda either: either.batch_repeat_interleave(3),
        lambda either: either.batch_select_indices(torch.tensor([0, 5])),
        lambda either: either.reset(),
        lambda either: either.reset(),
        lambda either: in_steps(model, tokens(), [5], either),
    ]
    for step in steps:
        for either in (past, plain):
            step(either)
        assert said(past) == said(plain)
    with pytest.raises(ValueError, match="minus the number of tokens to remove"):
        past.crop(3)


def test_all_can_be_taken_back_and_reset(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens()
    past = windowed(model)
    past.activate_past_recording()
    expected = in_steps(model, input_ids, [LENGTH], past)
    past.crop(-LENGTH)
    assert_logits_close(in_steps(model, input_ids, STEPS["chunks"], past), expected)
    past.reset()
    assert past.get_seq_length() == 0
    assert_logits_close(in_steps(model, input_ids, STEPS["chunks"], past), expected)


@pytest.mark.parametrize("prompt", [20, 100])
def test_sequences_can_be_reordered_repeated_selected_and_offloaded(make_model: ModelFactory, prompt: int) -> None:
    model = make_model(**SHAPES["6-heads-unsorted"])
    input_ids = tokens(batch=3, length=prompt + 40)
    past = windowed(model)
    in_steps(model, input_ids, [prompt], past)
    past.reorder_cache(torch.tensor([2, 0, 1]))
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([0, 2, 5]))
    for layer in past.layers:
        layer.offload()
        layer.prefetch()
    input_ids = input_ids[[2, 0, 1]]
    logits = in_steps(model, input_ids, [1] * 40, past)
    with torch.no_grad():
        assert_logits_close(logits, model(input_ids, use_cache=False).logits[:, -40:])


def test_padding_in_between_is_refused_only_if_it_needs_keys_that_are_gone(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens(batch=1)
    mask = torch.ones_like(input_ids)
    mask[:, 110:140] = 0
    with pytest.raises(ValueError, match="cache_implementation='dynamic'"):
        in_steps(model, input_ids, [110, 30, 10], windowed(model), mask)
    mask = torch.ones_like(input_ids)
    # The rings have as many spare slots.
    mask[:, 110:112] = 0
    logits = in_steps(model, input_ids, [105] + [1] * 45, windowed(model), mask)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits
    assert_logits_close(logits[mask == 1], expected[mask == 1])


def test_a_mask_of_the_callers_needs_all_keys(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens(1)
    past = windowed(model)
    in_steps(model, input_ids, [100], past)
    with torch.no_grad(), pytest.raises(ValueError, match="four dimensions"):
        model(input_ids[:, 100:101], attention_mask=torch.ones(1, 1, 1, 101, dtype=torch.bool), past_key_values=past)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_mask_of_the_callers_goes_with_the_heads_of_a_ring(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """All heads share a ring that has lost no key yet. In the ring, heads are sorted by window."""
    monkeypatch.setattr(cache, "SPARE", 64)
    monkeypatch.setattr(tiles, "SHARED_KEYS", 2048)
    model = make_model(num_attention_heads=4, alibi_slopes=[0.25, 4.0, 0.3, 3.0])
    input_ids = tokens(batch=1)
    mask = torch.rand(1, heads, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7
    mask = mask.tril() | torch.eye(LENGTH, dtype=torch.bool)
    past = windowed(model)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits[:, -5:]
        model(input_ids[:, :-5], attention_mask=mask[:, :, :-5, :-5], past_key_values=past)
        assert past.layers[0].keys is None
        found = model(input_ids[:, -5:], attention_mask=mask[:, :, -5:], past_key_values=past).logits
    assert_logits_close(found, expected)


@pytest.mark.parametrize(
    "without",
    [{"qk_norm": False}, {"window_tolerance": 0.0}, {"alibi_scaling": {"type": "dynamic"}}],
    ids=["no-qk-norm", "no-tolerance", "dynamic-scaling"],
)
def test_there_is_none_where_it_would_not_be_lossless(make_model: ModelFactory, without: dict[str, Any]) -> None:
    assert make_model(**without).model.windowed_cache() is None


def test_a_window_wider_than_any_text_takes_no_memory(make_model: ModelFactory) -> None:
    """The largest window is 10^13 keys. The other heads still drop keys."""
    model = make_model(num_attention_heads=4, alibi_slopes=[*STEEP[:3], 1e-12])
    past = windowed(model)
    logits = in_steps(model, tokens(), STEPS["a few at a time"], past)
    with torch.no_grad():
        assert_logits_close(logits, model(tokens(), use_cache=False).logits)
    assert held(past) < 3 * LENGTH


def test_only_sdpa_reads_it(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    past = windowed(model)
    model.set_attn_implementation("eager")
    assert model.model.windowed_cache() is None
    with pytest.raises(ValueError, match="sdpa"):
        in_steps(model, tokens(), [LENGTH], past)


def test_windows_follow_the_trained_gains(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    before = windowed(model).layers
    with torch.no_grad():
        model.model.layers[1].self_attn.q_norm.weight.mul_(2)
    after = windowed(model).layers
    assert after[0].windows == before[0].windows
    assert all(wide > narrow for wide, narrow in zip(after[1].windows, before[1].windows, strict=True))


def test_a_static_cache_is_as_long_as_it_was_made(make_model: ModelFactory) -> None:
    model = make_model(**SHAPES["4-heads"])
    input_ids = tokens()
    static = in_steps(model, input_ids, [100] + [1] * 50, StaticCache(config=model.config, max_cache_len=LENGTH))
    assert_logits_close(in_steps(model, input_ids, [100] + [1] * 50, windowed(model)), static)
