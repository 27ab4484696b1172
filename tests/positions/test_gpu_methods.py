"""Each position method, both caches of ours and continuous batching on a CUDA device: `pytest -m gpu`."""

import pytest
import torch
from test_methods import METHODS, TRAINED_SLOPES, make, tokens
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache

from hf_alibi import AlibiGPTForCausalLM

DEVICE = "cuda"
PADDING = 40
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def logits_and_gradients(model: AlibiGPTForCausalLM, input_ids: Tensor) -> dict[str, Tensor]:
    """Returns the logits of the first row and of the second without its padding, and the gradients, on the CPU."""
    mask = torch.ones_like(input_ids)
    mask[1, :PADDING] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    # The token before it is padding, whose logits are undefined.
    labels[1, PADDING] = -100
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    outputs = model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)
    outputs.loss.backward()
    found = {"logits": outputs.logits[mask.bool().to(model.device)].detach()}
    found |= {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: values.cpu().double() for name, values in found.items()}


@pytest.mark.parametrize("length", [63, 1100])
@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_logits_and_gradients_are_as_accurate_as_on_the_cpu(model_type: str, length: int) -> None:
    input_ids = tokens(2, length)
    exact, plain = (
        logits_and_gradients(make(model_type, attn_implementation="eager").to(dtype), input_ids)
        for dtype in (torch.float64, torch.float32)
    )
    for implementation in ("eager", "sdpa"):
        model = make(model_type).to(DEVICE)
        model.set_attn_implementation(implementation)
        found = logits_and_gradients(model, input_ids)
        assert found.keys() == exact.keys()
        for name, values in found.items():
            allowed = 4 * (plain[name] - exact[name]).norm() + 1e-6 * exact[name].norm()
            assert (values - exact[name]).norm() <= allowed, (implementation, name)


@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_cached_logits_equal_the_full_forward(model_type: str) -> None:
    model, input_ids = make(model_type).to(DEVICE), tokens(2, 700).to(DEVICE)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in input_ids.split([689, 10, 1], dim=1)]
        expected = model(input_ids).logits
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("qk_norm", [True, False], ids=["windowed-cache", "growing-cache"])
@pytest.mark.parametrize("length", [63, 3000])
def test_caches_of_ours_generate_what_a_dynamic_one_does(qk_norm: bool, length: int) -> None:
    # With half the slopes so steep, most keys are outside the windows.
    slopes = [4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    model = make("alibi_gpt", alibi_slopes=slopes, qk_norm=qk_norm, alibi_slopes_trainable=False).to(DEVICE)
    input_ids = tokens(2, length).to(DEVICE)
    ours = model.generate(input_ids, max_new_tokens=30, do_sample=False)
    dynamic = model.generate(input_ids, max_new_tokens=30, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(ours, dynamic)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_generates_what_generate_does(implementation: str) -> None:
    model = make("alibi_gpt", alibi_slopes_trainable=False).to(DEVICE)
    model.set_attn_implementation(implementation)
    prompts = [tokens(1, length)[0].tolist() for length in (5, 300, 33)]
    settings = ContinuousBatchingConfig(num_blocks=100, page_size=16, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, max_new_tokens=20, continuous_batching_config=settings)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.error is None
        alone = model.generate(torch.tensor([prompt], device=DEVICE), max_new_tokens=20, do_sample=False)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()
