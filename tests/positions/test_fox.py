"""The forgetting gate equals its formula, and stays exact at lengths where the sums of its gates are large."""

import math
from collections.abc import Mapping
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from layouts import TEXTS, assert_equals_formula
from torch import Tensor
from torch.func import functional_call, grad, jvp
from transformers import AutoConfig, AutoModelForCausalLM

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.model.cache import WindowedCache
from hf_alibi.model.layout import Shared, TokenLayout
from hf_alibi.positions.fox import FoxGPTAttention

each_backend = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def make(heads: int = 6, kv_heads: int = 3, layers: int = 1) -> AlibiGPTForCausalLM:
    """A model whose gates differ from token to token."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "initializer_range": 0.2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("fox_gpt", **shape)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.forget_proj.bias.uniform_(0, 4)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def by_formula(model: AlibiGPTForCausalLM, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The logits of one text from a model of one layer, `[tokens, vocab_size]`, in the dtype of the weights."""
    name = "model.layers.0.self_attn.forget_proj"
    hidden = weights["model.embed_tokens.weight"][ids]
    normed = F.rms_norm(hidden, hidden.shape[1:], weights["model.layers.0.input_layernorm.weight"], 1e-6)
    gates = torch.sigmoid((normed @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).double())  # [tokens, heads]
    rows = []
    for i in range(len(ids)):
        # Of key j, the sum over the tokens j + 1 to i.
        between = torch.stack([gates[j + 1 : i + 1].log().sum(0) for j in range(len(ids))])
        rows.append(between.T)
    text = oracle.Text(ids, torch.full([len(ids)], math.inf), added=torch.stack(rows, 1))
    return oracle.language_model(weights, model.config, text)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(6, 6, 63), (12, 3, 111)])
@pytest.mark.parametrize("batch", TEXTS)
@each_backend
def test_it_equals_its_formula(backend: str, batch: str, heads: int, kv_heads: int, length: int) -> None:
    """In float64, logits and the gradients of all parameters."""
    model, input_ids = make(heads, kv_heads).double(), tokens(2, length)
    model.set_attn_implementation(backend)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    assert_equals_formula(model, weights, input_ids, batch, lambda text: by_formula(model, weights, text))


@each_backend
def test_a_gate_that_is_always_the_same_is_a_slope(backend: str) -> None:
    slopes = torch.tensor([0.01, 0.1, 0.3, 1.0, 2.0, 8.0], dtype=torch.float64)
    fox, input_ids = make(layers=2).double(), tokens(2, 150)
    shape = {name: getattr(fox.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 3, "alibi_slopes": slopes.tolist()}
    alibi = AlibiGPTForCausalLM(AlibiGPTConfig(**shape)).double().eval()
    alibi.load_state_dict(fox.state_dict(), strict=False)
    with torch.no_grad():
        for layer in fox.model.layers:
            layer.self_attn.forget_proj.weight.zero_()
            # The logit of exp(-slope).
            layer.self_attn.forget_proj.bias.copy_(-torch.expm1(slopes).log())
    fox.set_attn_implementation(backend)
    torch.testing.assert_close(fox(input_ids).logits, alibi(input_ids).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("queries", [1, 2, 7, 128, 4000])
@each_backend
def test_large_sums_cost_no_precision(backend: str, queries: int) -> None:
    """Gates of 1/21 add up to 12,000 nats. One column for the sum would make an error of 0.01.

    The limit is a few times the error of a stored bias in float32, in the output and in the gradients.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model("fox_gpt", hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    config._attn_implementation = backend
    attention, length, scored = FoxGPTAttention(config, 0), 4000, min(queries, 128)
    query = 2 * torch.randn(1, 1, queries, 64)
    key, value = torch.randn(2, 1, 1, length, 64)
    gates = torch.randn(1, 1, length, 1) - 3
    direction = torch.randn(1, 1, scored, 64)

    def stored_bias(query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
        sums = F.logsigmoid(gates.double())[..., 0].cumsum(-1)
        rows = torch.arange(length - scored, length)
        bias = (sums[:, :, rows, None] - sums[:, :, None]).to(query.dtype)
        bias = bias.masked_fill(torch.arange(length) > rows[:, None], -math.inf)
        return (query[:, :, -scored:] @ key.mT / 8 + bias).softmax(-1) @ value

    def columns(query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
        positions = torch.arange(length)[None]
        layout = TokenLayout(torch.zeros(1), positions[:, -queries:], positions, Shared(), length=length)
        output, _ = attention.attend(query, torch.cat([key, gates], -1), value, layout, 1 / 8)
        return output.transpose(1, 2)[:, :, -scored:]

    results = []
    for function, dtype in ((stored_bias, torch.float64), (stored_bias, torch.float32), (columns, torch.float32)):
        inputs = [states.to(dtype).requires_grad_() for states in (query, key, value, gates)]
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output, inputs, direction.to(dtype))])
    for true, dense, found in zip(*results, strict=True):
        rounding = 4e-7 * true.abs().max().clamp(min=1)
        assert (found - true).abs().max() <= 4 * (dense - true).abs().max() + rounding


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@each_backend
def test_16_bits_are_as_accurate_as_the_formula_in_16_bits(backend: str, autocast: bool) -> None:
    model, input_ids = make(), tokens(2, 63)
    model.set_attn_implementation(backend)
    rounded = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}
    exact = {name: weight.double() for name, weight in rounded.items()}
    true = torch.stack([by_formula(model, exact, row) for row in input_ids])
    plain = torch.stack([by_formula(model, rounded, row) for row in input_ids])
    model.load_state_dict(rounded, strict=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = (model if autocast else model.bfloat16())(input_ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - true).norm() <= 1.2 * (plain - true).norm()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_transforms_of_torch_func(mode: str) -> None:
    model, input_ids = make(layers=2).double(), tokens(1, 9)
    name = "model.layers.0.self_attn.forget_proj.weight"
    weight = model.get_parameter(name).detach()
    results = []
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)

        def f(weight: Tensor) -> Tensor:
            return functional_call(model, {name: weight}, (input_ids,), {"use_cache": False}).logits.square().mean()

        results.append(grad(f)(weight) if mode == "reverse" else jvp(f, (weight,), (weight,))[1])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)
    assert results[0].abs().max() > 0


def test_dropout_takes_the_same_bias() -> None:
    """With dropout, kernels are called without the custom operator. This one drops practically nothing."""
    model, input_ids = make(layers=2).double(), tokens(2, 111)
    expected = model(input_ids).logits
    model.config.attention_dropout = 1e-15
    torch.testing.assert_close(model.train()(input_ids).logits, expected, rtol=0, atol=1e-12)


def test_weights_of_attention_are_returned() -> None:
    model, input_ids = make(), tokens(1, 20)
    model.set_attn_implementation("eager")
    (weights,) = model(input_ids, output_attentions=True).attentions
    assert weights.shape == (1, 6, 20, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, 20))


def test_whatever_has_no_room_for_gates_is_refused() -> None:
    model, input_ids = make(), tokens(1, 20)
    assert model.model.windowed_cache() is None
    with pytest.raises(ValueError, match="A WindowedCache needs a linear bias"):
        model(input_ids, past_key_values=WindowedCache([[200] * 6], torch.ones(6)))
    with pytest.raises(ValueError, match="fox_gpt has no continuous batching"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention computes linear biases only"):
        model(input_ids)
