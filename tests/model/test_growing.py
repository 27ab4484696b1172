"""The growing cache: it keeps every key, copies none to add a token, and looks only as far back as norms require."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cached import LENGTH, SHAPES, STEEP, STEPS, each_step, in_steps, tokens
from conftest import ModelFactory
from torch import Tensor
from transformers import DynamicCache

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM, GrowingCache
from hf_alibi.benchmark.measuring import MeasuringArguments, peak_mib
from hf_alibi.model import causal, growing, inputs, layout, sdpa, tiles
from hf_alibi.model.inputs import AttentionInputs

OWN_SHAPES = SHAPES | {"clipped": {"num_attention_heads": 4, "alibi_slopes": STEEP, "clip_qkv": 0.5}}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which short texts have windows, runs, and buffers that grow often."""
    small: dict[Any, dict[str, int]] = {
        growing: {"MIN_GROWTH": 3},
        tiles: {"FEW_KEYS": 10, "SHARED_KEYS": 12, "GRAIN": 4, "FULL_SPEED": 24, "KEY_BLOCK": 16, "NEAR_BLOCK": 8},
        causal: {"NEAR_BLOCK": 8, "FULL_SPEED": 24},
        inputs: {"FEW_KEYS": 10, "QUERY_BLOCK": 16},
        layout: {"QUERY_BLOCK": 16},
        sdpa: {"QUERY_BLOCK": 16},
    }
    for module, sizes in small.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


@pytest.fixture
def keys_looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of keys, of all heads together, of each kernel call with one query."""
    calls: list[int] = []
    kernel = causal.kernel

    def spy(of: AttentionInputs, bias: Tensor) -> Tensor:
        if of.query.shape[2] == 1:
            calls.append(of.key.shape[1] * of.key.shape[2])
        return kernel(of, bias)

    for module in (causal, sdpa):
        monkeypatch.setattr(module, "kernel", spy)
    return calls


def without_norms(make_model: ModelFactory, shape: dict[str, Any]) -> AlibiGPTForCausalLM:
    model = make_model(**shape, qk_norm=False)
    with torch.no_grad():
        for layer in model.model.layers:
            # Norms of queries and keys are then a few nats, as with QK-norm.
            layer.self_attn.q_proj.weight.mul_(0.7)
            layer.self_attn.k_proj.weight.mul_(0.7)
    return model


@torch.no_grad()
def exact(model: AlibiGPTForCausalLM, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Returns the logits of the whole text by the formula, in float64."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin(input_ids, use_cache=False, **kwargs).logits


def assert_logits_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@each_step
@pytest.mark.parametrize("shape", OWN_SHAPES.values(), ids=OWN_SHAPES.keys())
def test_decoding_equals_the_full_forward(
    make_model: ModelFactory, keys_looked_at: list[int], shape: dict[str, Any], steps: list[int]
) -> None:
    model = without_norms(make_model, shape)
    past = model.model.new_cache()
    assert type(past) is GrowingCache
    assert_logits_close(in_steps(model, tokens(), steps, past), exact(model, tokens()))
    if steps[-1] == 1:
        kv_heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
        last = keys_looked_at[-layers:] if kv_heads == 1 else keys_looked_at[-layers * 2 :]
        assert sum(last) < layers * kv_heads * LENGTH, "windows were not used"


@each_step
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padding(
    make_model: ModelFactory, keys_looked_at: list[int], backend: str, side: str, steps: list[int]
) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    model.set_attn_implementation(backend)
    input_ids = tokens(batch=4)
    padding = torch.tensor([0, 3, 20, 60])[:, None]
    slots = torch.arange(LENGTH)
    # Padding on the right is that of a prompt, which generated tokens follow.
    mask = (slots >= padding if side == "left" else (slots < 100 - padding) | (slots >= 100)).long()
    found = in_steps(model, input_ids, steps, model.model.new_cache(), mask)
    expected = exact(model, input_ids, attention_mask=mask)
    assert_logits_close(found[mask == 1], expected[mask == 1])
    if backend == "sdpa" and side == "left" and steps[-1] == 1:
        assert min(keys_looked_at) < 6 * LENGTH / 2, "windows were not used"


@each_step
def test_documents(make_model: ModelFactory, steps: list[int]) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    position_ids = torch.cat([torch.arange(n) for n in (30, 57, 8, 55)])[None]
    found = in_steps(model, tokens(1), steps, model.model.new_cache(), position_ids=position_ids)
    assert_logits_close(found, exact(model, tokens(1), position_ids=position_ids))


def test_a_chunk_of_padded_rows_needs_no_mask_of_queries_times_keys(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :40] = 0
    expected = exact(model, tokens(), attention_mask=mask)
    monkeypatch.setattr(layout.TokenLayout, "dense_bias", None)
    found = in_steps(model, tokens(), [50, 50, 50], model.model.new_cache(), mask)
    assert_logits_close(found[mask == 1], expected[mask == 1])


def test_a_mask_of_the_callers(make_model: ModelFactory) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    mask = torch.rand(1, 6, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = mask.tril() | torch.eye(LENGTH, dtype=torch.bool)
    past = model.model.new_cache()
    with torch.no_grad():
        model(tokens()[:, :-5], attention_mask=mask[:, :, :-5, :-5], past_key_values=past)
        found = model(tokens()[:, -5:], attention_mask=mask[:, :, -5:], past_key_values=past).logits
    assert_logits_close(found, exact(model, tokens(), attention_mask=mask)[:, -5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_16_bits_are_as_accurate_as_a_plain_cache(
    make_model: ModelFactory, dtype: torch.dtype, autocast: bool
) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    model = model if autocast else model.to(dtype)
    expected = exact(model, tokens())
    errors = []
    for past in (model.model.new_cache(), DynamicCache(config=model.config)):
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = in_steps(model, tokens(), STEPS["prompt, then tokens"], past)
        errors.append((found - expected).abs().max())
    assert errors[0] <= 1.2 * errors[1]


def test_a_large_key_far_away_is_seen(make_model: ModelFactory, keys_looked_at: list[int]) -> None:
    """The first token's key is far longer than all others, and the last query points to it."""
    model = make_model(num_attention_heads=2, num_hidden_layers=1, qk_norm=False)
    attention = model.model.layers[0].self_attn
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 1, 48), torch.randn(1, 2, LENGTH, 48) / 8, torch.randn(1, 2, LENGTH, 48)
    # It scores 40 nats, and loses 37 of them on the way.
    key[:, :, 0] = 40 / attention.scaling * query[:, :, 0] / query[:, :, 0].square().sum(-1, keepdim=True)
    norms = torch.linalg.vector_norm(key, dim=-1).amax((0, 2))
    plan = layout.token_layout(torch.tensor([0.25, 0.25]), torch.empty(1, LENGTH, 96), None, None, None)
    plan = plan._replace(queries=plan.queries[:, -1:])

    def attend(key_norms: Tensor | None) -> Tensor:
        with torch.no_grad():
            return sdpa.sdpa_attention_forward(
                attention, query, key, value, plan, attention.scaling, key_norms=key_norms
            )[0]

    torch.testing.assert_close(attend(norms), attend(None))
    assert keys_looked_at == [2 * LENGTH, 2 * LENGTH]
    narrow = attend(torch.linalg.vector_norm(key[:, :, 1:], dim=-1).amax((0, 2)))
    assert sum(keys_looked_at[2:]) < 2 * LENGTH, "this key does not matter"
    assert (narrow - attend(None)).abs().max() > 0.1


def test_a_token_copies_no_other(make_model: ModelFactory) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    past = model.model.new_cache()
    places = set()
    for _ in range(300):
        in_steps(model, tokens(1, 300), [1], past)
        (buffer,) = past.layers[0].buffers
        places.add(buffer.keys.data_ptr())
        assert past.layers[0].keys.data_ptr() == buffer.keys.data_ptr(), "a copy, not a view"
        assert buffer.keys.shape[2] <= 1.125 * past.get_seq_length() + growing.MIN_GROWTH
    assert len(places) < 50


def test_keys_and_values_may_differ_in_width_and_dtype() -> None:
    layer, random = growing.GrowingLayer(), torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 20, 8, generator=random)
    values = torch.randn(2, 3, 20, 5, generator=random).bfloat16()
    for part in range(0, 20, 4):
        found = layer.update(keys[:, :, part : part + 4], values[:, :, part : part + 4])
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)


def test_what_a_cache_says_of_itself_is_what_a_dynamic_cache_says(make_model: ModelFactory) -> None:
    """Before the first token, in the middle, and after a reset; and both give the same logits."""
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    both = model.model.new_cache(), DynamicCache(config=model.config)

    def said(either: Any) -> list[Any]:
        return [
            len(either),
            either.get_seq_length(),
            either.get_seq_length(1),
            either.get_mask_sizes(3, 1),
            either.get_max_length(),
            either.is_compileable,
            either.is_croppable,
            either.is_sliding,
            either.is_initialized,
            either.batch_size,
            [layer.keys.shape if either.get_seq_length() else None for layer in either.layers],
        ]

    sizes: dict[str, Any] = {"batch_size": 2, "num_heads": 6, "head_dim": 16, "dtype": torch.float32, "device": "cpu"}
    rows = [torch.tensor(index) for index in ([0, 1], [1, 0], [1, 0, 1, 0], [0, 3])]
    steps: list[Callable[[Any], Any]] = [
        lambda either: None,
        lambda either: either.early_initialization(**sizes),
        lambda either: in_steps(model, tokens(), [100, 1], either),
        lambda either: either.crop(0),
        lambda either: either.crop(-20),
        lambda either: either.reorder_cache(rows[1]),
        lambda either: in_steps(model, tokens()[rows[1]], [1] * 9, either),
        lambda either: either.batch_repeat_interleave(2),
        lambda either: either.batch_select_indices(rows[3]),
        lambda either: [(layer.offload(), layer.prefetch()) for layer in either.layers],
        lambda either: in_steps(model, tokens()[rows[1]], [1] * 9, either),
        lambda either: either.reset(),
        lambda either: either.reset(),
        lambda either: in_steps(model, tokens(3), [5], either),
    ]
    for step in steps:
        results = [step(either) for either in both]
        assert said(both[0]) == said(both[1])
        if isinstance(results[0], Tensor):
            torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="such as -3 for three tokens; got 3"):
        both[0].crop(3)


def test_taking_back_everything_leaves_an_empty_cache(make_model: ModelFactory) -> None:
    """The batch size may then change."""
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    past = model.model.new_cache()
    past.crop(-3)
    in_steps(model, tokens(3), [50], past)
    past.crop(-57)
    assert (past.get_seq_length(), past.get_mask_sizes(5, 0)) == (0, (5, 0))
    assert_logits_close(in_steps(model, tokens(), STEPS["chunks"], past), exact(model, tokens()))


def test_gradients_flow_through_it(make_model: ModelFactory) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    gradients = []
    for past in (model.model.new_cache(), None):
        loss = model(tokens(), labels=tokens(), past_key_values=past, use_cache=past is not None).loss
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_compiled_model_reads_it(make_model: ModelFactory) -> None:
    model = without_norms(make_model, SHAPES["6-heads-unsorted"])
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    found = in_steps(compiled, tokens(), [40, 30, 1, 9], model.model.new_cache())
    assert_logits_close(found, exact(model, tokens()[:, :80]))


def generating(length: int) -> Callable[[], Any]:
    """Returns a call that reads a prompt and generates two tokens."""
    config = AlibiGPTConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, qk_norm=False, eos_token_id=None
    )
    model = AlibiGPTForCausalLM(config).eval()
    prompt = torch.randint(3, 8192, (1, length), generator=torch.Generator().manual_seed(0))
    # What a first call loads is no part of the cache.
    model.generate(prompt[:, :3000], max_new_tokens=2)
    return partial(model.generate, prompt, max_new_tokens=2)


@pytest.mark.slow
def test_a_long_prompt_takes_little_more_memory_than_its_keys_and_values() -> None:
    length = 65536
    of_cache = 2 * 6 * 512 * length * 4 / 2**20
    peak = peak_mib(partial(generating, length), MeasuringArguments(device="cpu"))
    print(f"{peak:,.0f} MiB, {peak / of_cache:.3f} times the keys and values")
    assert of_cache < peak < 1.5 * of_cache
