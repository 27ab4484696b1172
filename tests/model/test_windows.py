"""The head windows: the bound holds for adversarial input and is nearly tight, and windows change no result."""

import math
from typing import Any

import oracle
import pytest
import torch
from conftest import ModelFactory
from torch import Tensor
from transformers import DynamicCache

from hf_alibi import AlibiGPTConfig
from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.model.causal import causal_attention
from hf_alibi.model.inputs import AttentionInputs
from hf_alibi.model.tiles import query_tiles
from hf_alibi.model.windows import UNLIMITED, WindowGuarantee, head_windows, norm_bounds, qk_norm_bound

HEAD_DIM = 16
SCALING = HEAD_DIM**-0.5


def adversary(bound: float, heads: int, length: int, window: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the last query, keys that score -bound inside a head's window and +bound beyond, and values to match."""
    direction = torch.ones(HEAD_DIM, dtype=torch.float64) * math.sqrt(bound / SCALING / HEAD_DIM)
    distance = torch.arange(length - 1, -1, -1)
    far = torch.stack([torch.where(distance > w, 1.0, -1.0).double() for w in window])
    query = direction.expand(1, heads, 1, HEAD_DIM)
    key = far[None, :, :, None] * direction
    return query, key, far[None, :, :, None].expand(1, heads, length, HEAD_DIM)


def lost_fraction(query: Tensor, key: Tensor, slope: float, window: int) -> float:
    """Returns the fraction of the attention beyond the window, for one query and head."""
    distance = torch.arange(key.shape[0] - 1, -1, -1).double()
    weights = (key @ query * SCALING - slope * distance).softmax(0)
    return weights[distance > window].sum().item()


@pytest.mark.parametrize("tolerance", [2.0**-24, 1e-3])
@pytest.mark.parametrize("bound", [0.5, 4.0])
@pytest.mark.parametrize("heads", [6, 12])
def test_the_bound_holds_and_is_nearly_reached(heads: int, bound: float, tolerance: float) -> None:
    slopes = alibi_slopes(heads)
    windows = head_windows(torch.tensor(slopes, dtype=torch.float64), torch.tensor(bound), tolerance).tolist()
    query, key, _ = adversary(bound, heads, 3 * max(windows), windows)
    for head, (slope, window) in enumerate(zip(slopes, windows, strict=True)):
        lost = lost_fraction(query[0, head, 0], key[0, head], slope, window)
        assert lost <= tolerance
        assert lost >= tolerance * math.exp(-2 * slope) / (1 + tolerance) * 0.99


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_leaving_out_the_rest_changes_the_output_by_less_than_promised(kv_heads: int) -> None:
    heads, bound, tolerance = 6, 2.0, 1e-4
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    windows = head_windows(slopes, torch.tensor(bound), tolerance)
    inputs = list(adversary(bound, heads, 3000, windows.tolist()))
    inputs[1:] = [states[:, :: heads // kv_heads] for states in inputs[1:]]
    assert any(tile.keys.start > 0 for tile in query_tiles(inputs[0], inputs[1], windows))
    output = causal_attention(AttentionInputs(*inputs, slopes, SCALING, 0.0, windows))
    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING)
    assert 0 < (output - expected).abs().max() <= 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (6, 2), (8, 1)])
def test_windows_at_float_rounding_change_neither_output_nor_gradients(
    heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    length, tolerance = 2300, 2.0**-24
    torch.manual_seed(0)
    shapes = [(1, heads, length, HEAD_DIM), (1, kv_heads, length, HEAD_DIM), (1, kv_heads, length, HEAD_DIM)]
    inputs = [(torch.randn(shape, dtype=torch.float64) / 2).to(dtype).requires_grad_() for shape in shapes]
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.promote_types(dtype, torch.float32))
    windows = head_windows(slopes, norm_bounds(inputs[0], inputs[1], SCALING), tolerance)
    assert any(tile.keys.start > 0 for tile in query_tiles(inputs[0], inputs[1], windows)) or kv_heads == 1

    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING)
    direction = torch.randn_like(expected)
    true = torch.autograd.grad(expected, inputs, direction)
    results = {}
    for name, reach in (("windows", windows), ("everything", None)):
        output = causal_attention(AttentionInputs(*inputs, slopes, SCALING, 0.0, reach))
        gradients = torch.autograd.grad(output, inputs, direction.to(dtype))
        pairs = zip((output, *gradients), (expected, *true), strict=True)
        results[name] = torch.stack([(actual - exact).abs().max() / exact.abs().max() for actual, exact in pairs])
    assert torch.all(results["windows"] <= 1.2 * results["everything"] + 2 * tolerance)


def test_bounds_are_those_of_cauchy_and_schwarz() -> None:
    torch.manual_seed(0)
    gains = torch.rand(2, HEAD_DIM) * 3
    query, key = (torch.nn.functional.rms_norm(torch.randn(2, 6, 111, HEAD_DIM), [HEAD_DIM], gain) for gain in gains)
    scores = (query @ key.transpose(2, 3) * SCALING).abs().amax((0, 2, 3))
    bounds = norm_bounds(query, key, SCALING)
    assert torch.all(scores <= bounds)
    assert scores.max() <= qk_norm_bound(gains[0], gains[1], HEAD_DIM)
    # Vectors along the channel with the largest product of gains reach this score.
    reached = (gains[0] * gains[1]).max().item() * math.sqrt(HEAD_DIM)
    assert qk_norm_bound(gains[0], gains[1], HEAD_DIM).item() == pytest.approx(reached, rel=0.011)


def test_each_head_has_the_bound_of_its_gain() -> None:
    torch.manual_seed(0)
    gains = torch.rand(6, 1) * 3
    query, key = (torch.nn.functional.rms_norm(torch.randn(2, 6, 111, HEAD_DIM), [HEAD_DIM]) for _ in range(2))
    scores = (query * gains[..., None] @ key.transpose(2, 3) * SCALING).abs().amax((0, 2, 3))
    bounds = qk_norm_bound(gains, torch.ones(1), HEAD_DIM)
    assert torch.all(scores <= bounds)
    # A key in the direction of its query reaches this score.
    torch.testing.assert_close(bounds, gains[:, 0] * math.sqrt(HEAD_DIM), rtol=0.011, atol=0)


@pytest.mark.parametrize(("slope", "bound"), [(0.0, 8.0), (1e-300, 8.0), (0.5, math.inf), (0.5, math.nan)])
def test_without_a_finite_distance_nothing_is_left_out(slope: float, bound: float) -> None:
    slopes, bounds = (torch.tensor(pair, dtype=torch.float64) for pair in ([1.0, slope], [8.0, bound]))
    assert head_windows(slopes, bounds, 1e-320).tolist() == [math.ceil(16 - math.log(1e-320)), UNLIMITED]


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no-qk-norm"])
def test_what_is_not_finite_is_seen_in_the_output(make_model: ModelFactory, qk_norm: bool) -> None:
    """A loss of NaN stops or skips a training step. An exception would end the training."""
    model = make_model(qk_norm=qk_norm)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(math.nan)
        if qk_norm:
            model.model.layers[0].self_attn.q_norm.weight.fill_(math.nan)
        assert model(torch.zeros(1, 1100, dtype=torch.long)).logits.isnan().all()


def promised(**values: Any) -> WindowGuarantee:
    guarantee = AlibiGPTConfig(**values).window_guarantee()
    assert guarantee is not None
    return guarantee


def test_the_example_of_eight_heads() -> None:
    guarantee = promised(hidden_size=512, num_attention_heads=8)
    unrounded = head_windows(torch.tensor(alibi_slopes(8)), torch.tensor(8.0), 2.0**-24).tolist()
    assert unrounded == [66, 131, 262, 523, 1045, 2089, 4178, 8355]
    for window, exact in zip(guarantee.windows, unrounded, strict=True):
        assert exact <= window <= 1.006 * exact + 1
    assert "window" in str(guarantee)
    assert f"{guarantee.windows[-1]:,}" in str(guarantee)


def test_the_promise_is_made_for_the_scaled_slopes() -> None:
    slopes = [slope / 4 for slope in alibi_slopes(8)]
    assert promised(alibi_scaling={"type": "linear", "factor": 4}) == promised(alibi_slopes=slopes)


@torch.no_grad()
def test_layers_start_with_what_the_config_promises_and_follow_their_gains(make_model: ModelFactory) -> None:
    model = make_model(qk_norm_gain="channel").model
    before, other = model.window_guarantees()
    new = promised(num_attention_heads=6, hidden_size=96)
    assert (before.windows, before.score_bounds) == (new.windows, new.score_bounds)
    model.layers[0].self_attn.k_norm.weight[3] = -2.0
    assert [guarantee.score_bound for guarantee in model.window_guarantees()] == [
        2 * before.score_bound,
        other.score_bound,
    ]


@torch.no_grad()
def test_a_head_with_a_larger_gain_has_a_wider_window(make_model: ModelFactory) -> None:
    model = make_model(qk_norm_gain="head").model
    new, _ = model.window_guarantees()
    model.layers[0].self_attn.q_norm.weight[3] = -2.0
    changed, other = model.window_guarantees()
    assert other == new
    assert changed.score_bounds == [2 * bound if head == 3 else bound for head, bound in enumerate(new.score_bounds)]
    assert changed.score_bound == 2 * new.score_bound
    wider = [head for head in range(6) if changed.windows[head] != new.windows[head]]
    assert wider == [3]
    assert changed.windows[3] > new.windows[3]


@pytest.mark.parametrize(
    "values", [{"qk_norm": False}, {"window_tolerance": 0}, {"alibi_scaling": {"type": "dynamic"}}], ids=str
)
def test_no_promise_without_a_bound(values: dict, make_model: ModelFactory) -> None:
    assert AlibiGPTConfig(**values).window_guarantee() is None
    assert make_model(**values).model.window_guarantees() is None


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 5}, {"type": "dynamic"}], ids=["linear", "dynamic"])
def test_windows_are_as_wide_as_scaled_slopes_need(make_model: ModelFactory, scaling: dict) -> None:
    model = make_model(hidden_size=48, training_length=360, alibi_scaling=scaling)
    input_ids = torch.randint(3, 97, (1, 1800))
    with torch.no_grad():
        windowed = model(input_ids).logits
        model.config.window_tolerance = 0
        expected = model(input_ids).logits
    assert not torch.equal(windowed, expected), "windows were not used"
    torch.testing.assert_close(windowed, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "norms-at-hand"])
def test_a_model_with_windows_gives_the_logits_of_one_without(make_model: ModelFactory, qk_norm: bool) -> None:
    model = make_model(qk_norm=qk_norm, qk_norm_gain="channel", hidden_size=48)
    if qk_norm:
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.data = torch.linspace(0.2, 1.5, norm.weight.numel())
    input_ids = torch.randint(3, 97, (1, 1800))
    with torch.no_grad():
        windowed = model(input_ids).logits
        cache = DynamicCache(config=model.config)
        model(input_ids[:, :1780], past_key_values=cache)
        pieces = [model(input_ids[:, 1780:1795], past_key_values=cache).logits]
        pieces += [model(input_ids[:, i : i + 1], past_key_values=cache).logits for i in range(1795, 1800)]
        model.config.window_tolerance = 0
        expected = model(input_ids).logits
    scale = expected.abs().max().item()
    assert not torch.equal(windowed, expected), "windows were not used"
    torch.testing.assert_close(windowed, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(torch.cat(pieces, 1), expected[:, 1780:], rtol=0, atol=1e-5 * scale)
