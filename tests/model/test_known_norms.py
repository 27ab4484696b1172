"""Windows follow the norms that really run. If a weight does not show the gain, windows are not narrower."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model.norms import AlibiGPTHeadRMSNorm, AlibiGPTRMSNorm

# The factor by which the output exceeds what the weight of the norm implies.
LOUD = 8.0


class Wrapper(nn.Module):
    """Like an adapter of a norm: another norm runs, but attributes are those of the wrapped norm."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.tuned = base, copy.deepcopy(base)
        self.tuned.weight.data *= LOUD

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    def forward(self, states: Tensor) -> Tensor:
        """Norms with the tuned gains."""
        return self.tuned(states)


class Louder(nn.Module):
    """A parametrization that enlarges a weight, or a module that enlarges its input."""

    def forward(self, states: Tensor) -> Tensor:
        """Returns them larger."""
        return LOUD * states


class LoudNorm(AlibiGPTRMSNorm):
    """A subclass with the same weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Norms, and more."""
        return LOUD * super().forward(hidden_states)


class LoudHeadNorm(AlibiGPTHeadRMSNorm):
    """The same with gains of heads."""

    def forward(self, hidden_states: Tensor, heads: slice = slice(None)) -> Tensor:
        """Norms, and more."""
        return LOUD * super().forward(hidden_states, heads)


class Replaced(nn.Module):
    """A norm of another kind, without a weight."""

    def forward(self, states: Tensor) -> Tensor:
        """Norms."""
        return LOUD * nn.functional.rms_norm(states, states.shape[-1:])


def replace_forward(norm: Any) -> None:
    plain = norm.forward
    norm.forward = lambda *args: LOUD * plain(*args)


def offload(norm: Any) -> None:
    """Makes a weight available only while its own module runs, as accelerate and DeepSpeed do."""
    weight = norm.weight.data * LOUD

    def fetch(module: Any, inputs: Any) -> None:
        module.weight.data = weight

    def release(module: Any, inputs: Any, output: Tensor) -> None:
        module.weight.data = weight.new_empty(0)

    norm.register_forward_pre_hook(fetch)
    norm.register_forward_hook(release)
    norm.weight.data = weight.new_empty(0)


def change(attention: Any, how: Callable[[nn.Module], nn.Module | None]) -> None:
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name).weight is None:
            continue
        other = how(getattr(attention, name))
        if other is not None:
            setattr(attention, name, other)


def set_class(norm: Any) -> None:
    norm.__class__ = LoudNorm if type(norm) is AlibiGPTRMSNorm else LoudHeadNorm


def hook(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, inputs, output: LOUD * output)


WAYS: dict[str, Callable[[Any], Any]] = {
    "adapter": Wrapper,
    "hook": hook,
    "parametrization": lambda norm: parametrize.register_parametrization(norm, "weight", Louder()) and None,
    "another-norm": lambda norm: Replaced(),
    "subclass": set_class,
    "forward-replaced": replace_forward,
    "offloaded": offload,
}
each_way = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS.keys())


@pytest.fixture(params=["channel", "head"])
def model(make_model: ModelFactory, request: pytest.FixtureRequest) -> AlibiGPTForCausalLM:
    return make_model(hidden_size=48, num_attention_heads=6, num_hidden_layers=1, qk_norm_gain=request.param)


def tokens(length: int) -> Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_equal_to_eager(model: AlibiGPTForCausalLM, found: Tensor, input_ids: Tensor) -> None:
    model.set_attn_implementation("eager")
    expected = model(input_ids, use_cache=False).logits[:, -found.shape[1] :]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@each_way
@torch.no_grad()
def test_a_norm_that_is_not_plain(model: AlibiGPTForCausalLM, how: Callable[[Any], Any]) -> None:
    """Its windows fit its output, no key leaves the cache, and an earlier cache is refused."""
    earlier = model.model.windowed_cache()
    change(model.model.layers[0].self_attn, how)
    input_ids = tokens(1300)
    assert_equal_to_eager(model, model(input_ids, use_cache=False).logits, input_ids)
    assert model.model.window_guarantees() is None
    assert model.model.windowed_cache() is None
    with pytest.raises(ValueError, match="Its windows may be too narrow"):
        model(input_ids[:, :5], past_key_values=earlier)
    output = model.generate(input_ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert output.sequences.shape == (1, 1303)


@torch.no_grad()
def test_attention_whose_forward_is_replaced_has_no_windowed_cache(model: AlibiGPTForCausalLM) -> None:
    attention = model.model.layers[0].self_attn
    replace_forward(attention)
    assert model.model.windowed_cache() is None


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@pytest.mark.parametrize("gone", ["meta", "empty", "shard", "no-storage"])
def test_a_weight_that_is_not_whole(model: AlibiGPTForCausalLM, name: str, gone: str) -> None:
    norm: Any = getattr(model.model.layers[0].self_attn, name)
    if norm.weight is None:
        pytest.skip("keys have no gain")
    whole = norm.weight.data
    if gone == "meta":
        norm.weight = nn.Parameter(whole.to("meta"))
    elif gone == "empty":
        norm.weight.data = whole.new_empty(0)
    elif gone == "shard":
        norm.weight.data = whole[:4]
    else:
        norm.weight.data = whole.clone()
        norm.weight.untyped_storage().resize_(0)
    assert model.model.window_guarantees() is None
    assert model.model.windowed_cache() is None


@torch.no_grad()
def test_functional_call(model: AlibiGPTForCausalLM) -> None:
    """Attention and cache use the weights of the call."""
    weights = {
        name: weight * LOUD
        for name, weight in model.named_parameters()
        if name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    input_ids = tokens(1300)

    def call(**kwargs: Any) -> Tensor:
        return torch.func.functional_call(model, weights, (input_ids,), kwargs).logits

    found = call(use_cache=False)
    with pytest.raises(ValueError, match="Its windows may be too narrow"):
        call(past_key_values=model.model.windowed_cache())
    model.load_state_dict(weights, strict=False)
    assert_equal_to_eager(model, found, input_ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_norm_without_a_gain_that_got_one(make_model: ModelFactory, name: str) -> None:
    model = make_model(num_hidden_layers=1, qk_norm_gain="none")
    assert model.model.window_guarantees() is not None
    norm: Any = getattr(model.model.layers[0].self_attn, name)
    norm.weight = nn.Parameter(torch.full((16,), LOUD))
    assert model.model.window_guarantees() is None
    input_ids = tokens(1300)
    assert_equal_to_eager(model, model(input_ids, use_cache=False).logits, input_ids)


@torch.no_grad()
@pytest.mark.parametrize("what", ["gain", "slope"])
def test_a_cache_from_before_a_training_step_is_refused(make_model: ModelFactory, what: str) -> None:
    model = make_model(alibi_slopes_trainable=True, qk_norm_gain="channel")
    past, input_ids = model.model.windowed_cache(), tokens(20)
    model(input_ids, past_key_values=past)
    changed: Any = model.model.layers[1].self_attn.k_norm.weight if what == "gain" else model.model.bias_log_slopes
    changed[2] += 0.01
    with pytest.raises(ValueError, match="weights have changed since"):
        model(input_ids, past_key_values=past)
    model(input_ids, past_key_values=model.model.windowed_cache())


@torch.no_grad()
def test_keys_that_other_weights_have_cached(model: AlibiGPTForCausalLM) -> None:
    """Windows follow the norms of the cached keys, not the current weights."""
    loud, input_ids = copy.deepcopy(model), tokens(2000)
    loud.model.layers[0].self_attn.k_norm.weight = nn.Parameter(torch.full((8,), LOUD))
    logits = {}
    for implementation in ("sdpa", "eager"):
        past = DynamicCache(config=model.config)
        for one, part in zip((loud, model), input_ids.split(1300, 1), strict=True):
            one.set_attn_implementation(implementation)
            logits[implementation] = one(part, past_key_values=past).logits
    scale = logits["eager"].abs().max().item()
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=0, atol=2e-5 * scale)
