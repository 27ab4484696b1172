"""Decoder layers with a gate, with clipping and in parallel equal the formulas in float64."""

import pytest
import torch
from conftest import ModelFactory
from oracle import attention, paper_slopes
from torch import Tensor, nn

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM

STATES = torch.randn(1, 40, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ACTIVATIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "relu2": lambda states: states.relu().square()}


def rms_norm(states: Tensor, gain: Tensor) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def attended(layer: nn.Module, states: Tensor, limit: float, qk_norm: bool) -> Tensor:
    """Returns the output of a layer's attention, with projections clipped before QK-norm."""
    module = layer.self_attn
    heads = []
    for name in "qkv":
        head = (states @ getattr(module, f"{name}_proj").weight.T).clamp(-limit, limit).unflatten(-1, (6, 16))
        if qk_norm and name != "v":
            head = rms_norm(head, getattr(module, f"{name}_norm").weight)
        heads.append(head.transpose(1, 2))
    output = attention(*heads, paper_slopes(6), 16**-0.5)
    return output.transpose(1, 2).flatten(2) @ module.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_feed_forward_layer(make_model: ModelFactory, activation: str, gated: bool) -> None:
    mlp = make_model(hidden_act=activation, mlp_gated=gated, mlp_bias=True).double().model.layers[0].mlp
    up = STATES @ mlp.up_proj.weight.T + mlp.up_proj.bias
    inner = ACTIVATIONS[activation](STATES @ mlp.gate_proj.weight.T + mlp.gate_proj.bias) * up if gated else None
    inner = ACTIVATIONS[activation](up) if inner is None else inner
    torch.testing.assert_close(mlp(STATES), inner @ mlp.down_proj.weight.T + mlp.down_proj.bias)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no-qk-norm"])
@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_a_decoder_layer(
    make_model: ModelFactory, parallel: bool, limit: float | None, qk_norm: bool, backend: str
) -> None:
    model = make_model(use_parallel_residual=parallel, clip_qkv=limit, qk_norm=qk_norm, qk_norm_gain="channel")
    model.set_attn_implementation(backend)
    recorded = model.model(inputs_embeds=STATES.float(), output_hidden_states=True, use_cache=False).hidden_states
    layer = model.model.layers[0].double()
    after = STATES + attended(layer, rms_norm(STATES, layer.input_layernorm.weight), limit or torch.inf, qk_norm)
    expected = after + layer.mlp(rms_norm(STATES if parallel else after, layer.post_attention_layernorm.weight))
    scale = expected.abs().max().item()
    torch.testing.assert_close(recorded[1].double(), expected, rtol=0, atol=2e-6 * scale)


def test_clipping_leaves_the_windows_of_qk_norm_as_they_are(make_model: ModelFactory) -> None:
    model, clipped = make_model(), make_model(clip_qkv=0.1)
    assert str(model.model.window_guarantees()) == str(clipped.model.window_guarantees())
    # The distance exceeds every window, and the text is longer than the windows.
    input_ids = torch.randint(3, 97, (1, 1500), generator=torch.Generator().manual_seed(0))
    exact = AlibiGPTForCausalLM(AlibiGPTConfig(**clipped.config.to_dict() | {"window_tolerance": 0})).eval()
    exact.load_state_dict(clipped.state_dict())
    with torch.no_grad():
        expected = exact(input_ids).logits
        torch.testing.assert_close(
            clipped(input_ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )
        assert torch.equal(clipped.generate(input_ids, max_new_tokens=8), exact.generate(input_ids, max_new_tokens=8))


def test_a_gate_is_a_third_of_the_feed_forward_weights() -> None:
    shape = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    plain, gated = (AlibiGPTForCausalLM(AlibiGPTConfig(mlp_gated=is_gated, **shape)) for is_gated in (False, True))
    assert gated.num_parameters() - plain.num_parameters() == 2 * 4 * 96 * 96
    assert not any("gate" in name for name, _ in plain.named_parameters())
