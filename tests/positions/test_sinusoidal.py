"""The sinusoidal baseline is the same model with other positions."""

import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM, sinusoidal_embeddings

SHAPE = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}


@pytest.fixture
def model() -> SinusoidalGPTForCausalLM:
    torch.manual_seed(0)
    return SinusoidalGPTForCausalLM(SinusoidalGPTConfig(initializer_range=0.2, **SHAPE)).eval()


def test_embeddings_are_the_papers() -> None:
    embeddings = sinusoidal_embeddings(torch.arange(300)[None], 8)[0]
    for position in (0, 1, 299):
        for pair in range(4):
            angle = position / 10_000 ** (2 * pair / 8)
            assert embeddings[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert embeddings[position, 4 + pair].item() == pytest.approx(math.cos(angle), abs=1e-4)


def test_it_differs_from_alibi_in_positions_alone(model: SinusoidalGPTForCausalLM) -> None:
    alibi = AlibiGPTForCausalLM(model.config)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in alibi.named_parameters()}


@pytest.mark.parametrize("length", [63, 1100])
def test_cached_logits_equal_the_full_forward(model: SinusoidalGPTForCausalLM, length: int) -> None:
    input_ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids).logits
    cache = DynamicCache(config=model.config)
    steps = [model(piece, past_key_values=cache).logits for piece in input_ids.split([length - 11, 10, 1], dim=1)]
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5 * scale)


def test_auto_classes_find_it() -> None:
    config = AutoConfig.for_model("sinusoidal_gpt", **SHAPE)
    assert type(AutoModelForCausalLM.from_config(config)) is SinusoidalGPTForCausalLM


def test_attention_begins_near_by() -> None:
    model = SinusoidalGPTForCausalLM(SinusoidalGPTConfig(**SHAPE, num_key_value_heads=3))
    for layer in model.model.layers:
        attention = layer.self_attn
        assert torch.all(attention.q_norm.weight == 2)
        for head in range(3):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            first_query = slice(2 * head * attention.head_dim, (2 * head + 1) * attention.head_dim)
            assert torch.equal(attention.k_proj.weight[rows], attention.q_proj.weight[first_query])


def test_loading_keeps_trained_projections(tmp_path: Path) -> None:
    model = SinusoidalGPTForCausalLM(SinusoidalGPTConfig(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = SinusoidalGPTForCausalLM.from_pretrained(tmp_path)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_mimetic_weights_are_an_option() -> None:
    plain, alibi = (
        make_config(**SHAPE, **more)
        for make_config, more in ((SinusoidalGPTConfig, {"mimetic_init": False}), (AlibiGPTConfig, {}))
    )
    torch.manual_seed(0)
    found = SinusoidalGPTForCausalLM(plain).state_dict()
    torch.manual_seed(0)
    for name, weight in AlibiGPTForCausalLM(alibi).state_dict().items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("scale", [0.125, 0.5])
def test_sinusoids_have_their_scale_of_the_tokens_size(scale: float) -> None:
    model = SinusoidalGPTForCausalLM(SinusoidalGPTConfig(sinusoid_scale=scale, **SHAPE)).model
    tokens = torch.randn(1, 50, 96)
    summed = model.with_positions(tokens, torch.arange(50)[None])
    normed = tokens * tokens.square().mean(-1, keepdim=True).rsqrt()
    size = (summed - 0.3 * normed).square().mean().sqrt()
    assert size.item() == pytest.approx(0.3 * scale, rel=1e-3)


def test_a_scale_that_cannot_be_is_refused() -> None:
    with pytest.raises(StrictDataclassError, match="sinusoid_scale must be positive and finite, got 0"):
        SinusoidalGPTConfig(sinusoid_scale=0, **SHAPE)
