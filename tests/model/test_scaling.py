"""Position interpolation: the slopes of a forward pass, and their effect on keys that were cached before."""

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import ModelFactory
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.model.alibi import interpolated_slopes
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM

TRAINING_LENGTH, LENGTH = 16, 47
LINEAR = {"type": "linear", "factor": 3.0}
DYNAMIC = {"type": "dynamic"}
each_scaling = pytest.mark.parametrize("scaling", [LINEAR, DYNAMIC], ids=["linear", "dynamic"])
each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])
each_cache = pytest.mark.parametrize("static", [False, True], ids=["dynamic-cache", "static-cache"])
Cache = DynamicCache | StaticCache


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padding(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Returns a mask with 7, 14, … padding tokens on the left of the rows."""
    padding = 7 * torch.arange(1, batch + 1)
    return (torch.arange(length) >= padding[:, None]).long()


def scaled_model(make_model: ModelFactory, scaling: dict[str, Any], **kwargs: Any) -> AlibiGPTForCausalLM:
    return make_model(training_length=TRAINING_LENGTH, alibi_scaling=scaling, **kwargs)


def model_with_divided_slopes(make_model: ModelFactory, divisor: float, **kwargs: Any) -> AlibiGPTForCausalLM:
    """Returns a model with the same weights and with the divided slopes in the config."""
    return make_model(alibi_slopes=[slope / divisor for slope in oracle.paper_slopes(6)], **kwargs)


def new_cache(model: AlibiGPTForCausalLM, static: bool) -> Cache:
    return StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)


def assert_logits_close(actual: Tensor, expected: Tensor) -> None:
    """Asserts equality up to 1e-5 of the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("length", [1, 16, 17, 64, 100_000])
def test_slopes_shrink_as_the_length_grows_beyond_the_training(length: int) -> None:
    slopes = torch.tensor(oracle.paper_slopes(12), dtype=torch.float64)
    expected = slopes * 16 / length if length > 16 else slopes
    torch.testing.assert_close(interpolated_slopes(slopes, 16, torch.tensor(length)), expected, rtol=1e-15, atol=0)


@each_backend
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
def test_a_linear_factor_divides_the_slopes_once(make_model: ModelFactory, backend: str, trainable: bool) -> None:
    model = scaled_model(make_model, LINEAR, alibi_slopes_trainable=trainable)
    model.set_attn_implementation(backend)
    assert_logits_close(model(tokens()).logits, model_with_divided_slopes(make_model, 3.0)(tokens()).logits)


TEXTS: dict[str, tuple[dict[str, Tensor], int]] = {
    "one text": ({}, LENGTH),
    "left padding": ({"attention_mask": left_padding()}, LENGTH - 7),
    "right padding": ({"attention_mask": left_padding().flip(1)}, LENGTH - 7),
    "documents": ({"position_ids": torch.cat([torch.arange(size) for size in (20, 25, 2)])[None]}, 25),
    "own mask": ({"attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()}, LENGTH),
    "own mask and positions": (
        {
            "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril(),
            "position_ids": torch.arange(LENGTH)[None] // 2,
        },
        LENGTH // 2 + 1,
    ),
}


@each_backend
@pytest.mark.parametrize(("inputs", "length"), TEXTS.values(), ids=TEXTS.keys())
def test_dynamic_slopes_follow_the_longest_text(
    make_model: ModelFactory, backend: str, inputs: dict[str, Tensor], length: int
) -> None:
    model, expected = (
        scaled_model(make_model, DYNAMIC),
        model_with_divided_slopes(make_model, length / TRAINING_LENGTH),
    )
    model.set_attn_implementation(backend)
    expected.set_attn_implementation(backend)
    assert_logits_close(model(tokens(), **inputs).logits, expected(tokens(), **inputs).logits)


@each_cache
def test_dynamic_scaling_does_nothing_up_to_the_training_length(make_model: ModelFactory, static: bool) -> None:
    model, unscaled = scaled_model(make_model, DYNAMIC), make_model()
    input_ids = tokens(length=TRAINING_LENGTH)
    expected = unscaled(input_ids).logits
    assert torch.equal(model(input_ids).logits, expected)
    cache = new_cache(model, static)
    pieces = [model(piece, past_key_values=cache).logits for piece in input_ids.split([9, 1, 6], 1)]
    assert_logits_close(torch.cat(pieces, 1), expected)


@each_cache
def test_with_linear_scaling_cached_logits_equal_the_full_forward(make_model: ModelFactory, static: bool) -> None:
    model = scaled_model(make_model, LINEAR)
    input_ids, mask = tokens(), left_padding()
    expected = model(input_ids, attention_mask=mask).logits
    cache, pieces, end = new_cache(model, static), [], 0
    for piece in input_ids.split([30, 1, 15, 1], 1):
        end += piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :end], past_key_values=cache).logits)
    assert_logits_close(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()])


@each_backend
@each_cache
def test_a_pass_applies_its_own_slopes_to_every_cached_key(
    make_model: ModelFactory, backend: str, static: bool
) -> None:
    """In a single layer, cached keys and values depend on tokens alone, so they are always up to date."""
    model = scaled_model(make_model, DYNAMIC, num_hidden_layers=1)
    model.set_attn_implementation(backend)
    input_ids, mask = tokens(), left_padding()
    cache, end = new_cache(model, static), 0
    for piece in input_ids.split([10, 1, 20, 1, 1, 14], 1):
        start, end = end, end + piece.shape[1]
        actual = model(piece, attention_mask=mask[:, :end], past_key_values=cache).logits
        expected = model(input_ids[:, :end], attention_mask=mask[:, :end]).logits[:, start:]
        assert_logits_close(actual[mask[:, start:end].bool()], expected[mask[:, start:end].bool()])


@torch.no_grad()
@each_cache
def test_earlier_tokens_stay_what_the_slopes_of_their_time_made_them(make_model: ModelFactory, static: bool) -> None:
    model = scaled_model(make_model, DYNAMIC)
    input_ids, cache = tokens(), new_cache(model, static)
    model(input_ids[:, :30], past_key_values=cache)
    same_cache = copy.deepcopy(cache)
    actual = model(input_ids[:, 30:], past_key_values=cache).logits
    now = model_with_divided_slopes(make_model, LENGTH / TRAINING_LENGTH)
    assert_logits_close(actual, now(input_ids[:, 30:], past_key_values=same_cache).logits)
    full = model(input_ids).logits[:, 30:]
    assert (actual - full).abs().max() > 1e-3 * full.abs().max()


@each_scaling
def test_generation_goes_by_the_same_rules(make_model: ModelFactory, scaling: dict[str, Any]) -> None:
    """In a single layer cached generation equals generation without a cache, whatever the scaling."""
    model = scaled_model(make_model, scaling, num_hidden_layers=1)
    settings = {"attention_mask": left_padding(length=20), "max_new_tokens": 20, "pad_token_id": 0}
    cached = model.generate(tokens(length=20), **settings)
    assert torch.equal(cached, model.generate(tokens(length=20), use_cache=False, **settings))
    assert torch.equal(cached, model.generate(tokens(length=20), cache_implementation="static", **settings))


# PyTorch's compiler imports a module that uses deprecated functions of PyTorch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@each_scaling
def test_one_graph_serves_every_length(make_model: ModelFactory, scaling: dict[str, Any]) -> None:
    model, graphs = scaled_model(make_model, scaling), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    input_ids, logits = tokens(), {}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for name, step in (("eager", model), ("compiled", compiled)):
            cache = new_cache(model, static=True)
            model(input_ids[:, :12], past_key_values=cache)
            steps = [step(piece, past_key_values=cache).logits for piece in input_ids[:, 12:].split(1, 1)]
            logits[name] = torch.cat(steps, 1)
    assert len(graphs) == 1
    assert_logits_close(logits["compiled"], logits["eager"])


def test_a_scaling_can_be_given_to_a_checkpoint_and_is_saved(make_model: ModelFactory, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", alibi_scaling=LINEAR)
    expected = model_with_divided_slopes(make_model, 3.0)(tokens()).logits
    assert_logits_close(model(tokens()).logits, expected)
    model.save_pretrained(tmp_path / "scaled")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")
    assert loaded.config.alibi_scaling == LINEAR
    assert_logits_close(loaded(tokens()).logits, expected)
    loaded.config.alibi_scaling = None
    assert_logits_close(loaded(tokens()).logits, make_model()(tokens()).logits)


BAD_SCALINGS: dict[str, Any] = {
    "no dictionary": "linear",
    "empty": {},
    "no type": {"factor": 2.0},
    "unknown type": {"type": "yarn", "factor": 2.0},
    "no factor": {"type": "linear"},
    "a factor in words": {"type": "linear", "factor": "two"},
    "a factor of yes": {"type": "linear", "factor": True},
    "below one": {"type": "linear", "factor": 0.5},
    "negative": {"type": "linear", "factor": -2},
    "infinite": {"type": "linear", "factor": float("inf")},
    "not a number": {"type": "linear", "factor": float("nan")},
    "a factor too many": {"type": "dynamic", "factor": 2.0},
    "unknown key": {"type": "linear", "factor": 2.0, "train_seq_len": 512},
}


@pytest.mark.parametrize("scaling", BAD_SCALINGS.values(), ids=BAD_SCALINGS.keys())
def test_a_scaling_without_a_meaning_is_refused(scaling: Any) -> None:
    message = "alibi_scaling' with value" if isinstance(scaling, str) else "alibi_scaling must be None, .*; got {"
    with pytest.raises(StrictDataclassError, match=message):
        AlibiGPTConfig(alibi_scaling=scaling)
    config = AlibiGPTConfig(alibi_scaling=DYNAMIC)
    with pytest.raises(StrictDataclassError, match=message):
        config.alibi_scaling = scaling
    assert config.alibi_scaling == DYNAMIC


@each_scaling
def test_sinusoidal_positions_have_nothing_to_scale(scaling: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6}
    model = SinusoidalGPTForCausalLM(SinusoidalGPTConfig(training_length=TRAINING_LENGTH, **shape)).eval()
    expected = model(tokens()).logits
    model.config.alibi_scaling = scaling
    assert torch.equal(model(tokens()).logits, expected)
