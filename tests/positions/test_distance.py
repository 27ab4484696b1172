"""Biases that depend on the distance alone equal their formulas, forward and backward, and stay exact in 16 bits."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from layouts import TEXTS, assert_equals_formula
from torch import Tensor
from torch.func import functional_call, grad, jvp
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.trainer_pt_utils import get_parameter_names

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model.cache import WindowedCache
from hf_alibi.positions.t5 import buckets_of

BIAS = "model.distance_bias"


def kerple(weights: Mapping[str, Tensor], distance: Tensor) -> Tensor:
    r1, r2 = (weights[f"{BIAS}.{name}"].exp()[:, None, None] for name in ("log_r1", "log_r2"))
    return -r1 * (1 + r2 * distance).log()


def hype(weights: Mapping[str, Tensor], distance: Tensor) -> Tensor:
    tau, mu = (weights[f"{BIAS}.{name}"].exp()[:, None, None] for name in ("log_tau", "log_mu"))
    return -tau * ((mu * distance).exp() - (-mu * distance).exp()) / 2


def t5(weights: Mapping[str, Tensor], distance: Tensor) -> Tensor:
    def bucket(d: int) -> int:
        return d if d < 16 else min(31, 16 + int(math.log(d / 16) / math.log(128 / 16) * 16))

    buckets = torch.tensor([[bucket(d) for d in row] for row in distance.tolist()])
    return weights[f"{BIAS}.table"][:, buckets]


FORMULAS: dict[str, Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {
    "kerple_gpt": kerple,
    "hype_gpt": hype,
    "t5_gpt": t5,
}
each_method = pytest.mark.parametrize("model_type", FORMULAS)
each_backend = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def make(model_type: str, heads: int = 6, kv_heads: int = 3, **fields: Any) -> AlibiGPTForCausalLM:
    """A model whose bias matters."""
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "training_length": 64}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "initializer_range": 0.2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | fields))).eval()
    with torch.no_grad():
        for parameter in model.model.distance_bias.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def by_formula(model: AlibiGPTForCausalLM, weights: Mapping[str, Tensor], ids: Tensor, **text: Any) -> Tensor:
    """The logits of one text, `[tokens, vocab_size]`, in the dtype of the weights."""
    positions = text.get("positions", torch.arange(len(ids)))
    added = FORMULAS[model.config.model_type](weights, (positions[:, None] - positions).abs())
    # ALiBi's slopes, divided by infinity, are 0.
    no_slopes = torch.full([len(ids)], math.inf)
    return oracle.language_model(weights, model.config, oracle.Text(ids, no_slopes, added=added, **text))


def leaves(model: AlibiGPTForCausalLM) -> dict[str, Tensor]:
    return {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(6, 6, 63), (12, 3, 111)])
@pytest.mark.parametrize("batch", TEXTS)
@each_backend
@each_method
def test_it_equals_its_formula(
    model_type: str, backend: str, batch: str, heads: int, kv_heads: int, length: int
) -> None:
    """In float64, logits and the gradients of all parameters."""
    model, input_ids = make(model_type, heads, kv_heads).double(), tokens(2, length)
    model.set_attn_implementation(backend)
    weights = leaves(model)
    assert_equals_formula(model, weights, input_ids, batch, lambda text: by_formula(model, weights, text))


@pytest.mark.parametrize("length", [511, 1100])
@each_method
def test_gradients_over_several_blocks_equal_those_of_eager(model_type: str, length: int) -> None:
    model, input_ids = make(model_type).double(), tokens(2, length)
    gradients = []
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        atol = 1e-12 * gradients[1][name].abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=atol)


@each_method
def test_a_first_pass_over_part_of_the_text_has_the_right_gradients(model_type: str) -> None:
    """Cached keys come before the queries, so the line is longer than the queries."""
    model, input_ids = make(model_type).double(), tokens(1, 700)
    weights = leaves(model)
    pieces, cache = [], None
    for piece in input_ids.split([600, 99, 1], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.get("cache", outputs.get("past_key_values"))
        pieces.append(outputs.logits[0])
    found, expected = torch.cat(pieces), by_formula(model, weights, input_ids[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.model.distance_bias.named_parameters():
        true = weights[f"{BIAS}.{name}"].grad
        assert true is not None
        torch.testing.assert_close(parameter.grad, true, rtol=0, atol=1e-11 * true.abs().max().item())


@each_backend
@each_method
def test_positions_of_a_mask_may_be_far_apart(model_type: str, backend: str) -> None:
    """Further than there are tokens."""
    model, input_ids = make(model_type).double(), tokens(1, 30)
    model.set_attn_implementation(backend)
    positions = torch.cat([torch.arange(20), torch.arange(90, 100)])
    visible = torch.ones(30, 30, dtype=torch.bool).tril()
    with torch.no_grad():
        found = model(input_ids, attention_mask=visible[None, None], position_ids=positions[None]).logits[0]
        expected = by_formula(model, leaves(model), input_ids[0], positions=positions, visible=visible[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@each_method
def test_dropout_takes_the_same_bias(model_type: str) -> None:
    """With dropout, kernels are called without the custom operator. This one drops practically nothing."""
    model, input_ids = make(model_type).double(), tokens(2, 900)
    gradients, losses = [], []
    for dropout in (1e-15, 0.0):
        model.config.attention_dropout = dropout
        model.train().zero_grad()
        losses.append(model(input_ids, labels=input_ids).loss)
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    for found, expected in zip(*gradients, strict=True):
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@each_method
def test_transforms_of_torch_func(model_type: str, mode: str) -> None:
    model, input_ids = make(model_type).double(), tokens(1, 9)
    name, parameter = list(model.named_parameters())[-1]
    assert name.startswith(BIAS)
    weight, direction = parameter.detach(), torch.randn_like(parameter)
    results = []
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)

        def f(weight: Tensor) -> Tensor:
            return functional_call(model, {name: weight}, (input_ids,), {"use_cache": False}).logits.square().mean()

        results.append(grad(f)(weight) if mode == "reverse" else jvp(f, (weight,), (direction,))[1])
    torch.testing.assert_close(*results, rtol=1e-10, atol=0)
    assert results[0].abs().max() > 0


@each_method
def test_16_bits_round_no_bias(model_type: str, tmp_path: Path) -> None:
    """Parameters keep float32 when a model is made, cast or loaded, and their gradients are as accurate as eager's."""
    model, input_ids = make(model_type), tokens(1, 600)
    exact = {name: weight.clone() for name, weight in model.model.distance_bias.named_parameters()}
    model.save_pretrained(tmp_path)
    true = make(model_type).double()
    true(input_ids, labels=input_ids).loss.backward()
    error = {}
    for backend in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation=backend
        ).train()
        loaded(input_ids, labels=input_ids).loss.backward()
        found = dict(loaded.model.distance_bias.named_parameters())
        error[backend] = sum((found[name].grad - true.get_parameter(f"{BIAS}.{name}").grad).norm() for name in exact)
        for cast in (loaded, model.bfloat16()):
            assert cast.dtype == torch.bfloat16
            for name, weight in cast.model.distance_bias.named_parameters():
                assert torch.equal(weight, exact[name]), name
    assert error["sdpa"] <= 1.5 * error["eager"]
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert {weight.dtype for weight in made.model.distance_bias.parameters()} == {torch.float32}
    rounded = {f"{BIAS}.{name}": weight.bfloat16() for name, weight in exact.items()}
    with pytest.raises(ValueError, match=r"has been cast to torch\.bfloat16"):
        functional_call(model, rounded, (input_ids,))


@each_method
def test_whatever_needs_a_linear_bias_is_refused(model_type: str) -> None:
    with pytest.raises(StrictDataclassError, match=r"window_tolerance must be 0, got 0\.1"):
        make(model_type, window_tolerance=0.1)
    model, input_ids = make(model_type), tokens(1, 20)
    assert model.model.windowed_cache() is None
    cache = WindowedCache([[200] * 6] * 2, torch.ones(6))
    with pytest.raises(ValueError, match="A WindowedCache needs a linear bias"):
        model(input_ids, past_key_values=cache)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention computes linear biases only"):
        model(input_ids)


@each_backend
@each_method
def test_continuous_batching_gives_the_tokens_of_generate(model_type: str, backend: str) -> None:
    model = make(model_type)
    model.set_attn_implementation(backend)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    prompts = [tokens(1, length) for length in (5, 150, 33)]
    settings = ContinuousBatchingConfig(num_blocks=40, page_size=16, max_batch_tokens=64)
    outputs = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts], max_new_tokens=8, continuous_batching_config=settings
    )
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.generated_tokens == model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


@each_method
def test_weight_decay_leaves_the_bias_alone(model_type: str) -> None:
    model = make(model_type)
    decayed = get_parameter_names(model, [], [r"bias"])
    assert not [name for name in decayed if name.startswith(BIAS)]


def test_buckets_are_those_of_transformers() -> None:
    distances = torch.arange(5000)
    for buckets, furthest in [(32, 128), (64, 512), (2, 9)]:
        expected = T5Attention._relative_position_bucket(-distances, False, buckets, furthest)
        assert torch.equal(buckets_of(distances, buckets, furthest), expected)


@pytest.mark.parametrize(("buckets", "furthest"), [(31, 128), (0, 128), (32, 16)])
def test_impossible_buckets_are_refused(buckets: int, furthest: int) -> None:
    with pytest.raises(StrictDataclassError, match=f"more than half of it, got {buckets} and {furthest}"):
        AutoConfig.for_model(
            "t5_gpt", relative_attention_num_buckets=buckets, relative_attention_max_distance=furthest
        )


def test_first_values() -> None:
    made = {name: AutoModelForCausalLM.from_config(make(name, heads=12, kv_heads=12).config) for name in FORMULAS}
    bias = {name: model.model.distance_bias(torch.arange(64)) for name, model in made.items()}
    alibi = -torch.tensor(oracle.paper_slopes(12))[:, None] * torch.arange(64)
    assert (bias["hype_gpt"] <= alibi).all()
    assert (bias["hype_gpt"] >= 1.18 * alibi).all()
    assert bias["t5_gpt"].std().item() == pytest.approx(96**-0.5, rel=0.2)
    r1, r2 = (getattr(made["kerple_gpt"].model.distance_bias, name).exp() for name in ("log_r1", "log_r2"))
    assert 0 < r1.min() < 1 < r1.max() < 2
    assert 0 < r2.min() < 0.5 < r2.max() < 1


def test_very_distant_keys_have_finite_gradients() -> None:
    """The hyperbolic sine of large distances is beyond float32."""
    model, input_ids = make("hype_gpt", training_length=2), tokens(1, 400)
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.isfinite()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
