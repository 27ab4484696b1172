"""Continuous batching gives every request the same tokens as `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from conftest import ModelFactory
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model import tiles
from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.model.causal import attention_in_runs
from hf_alibi.model.inputs import AttentionInputs
from hf_alibi.model.paged import paged_config, paged_layout
from hf_alibi.model.runs import runs_of_bounds
from hf_alibi.model.windows import head_windows, norm_bounds

LENGTHS = [5, 700, 33, 64, 1, 130]
SHAPES = {
    "6-heads": {},
    "12-heads-grouped": {"num_attention_heads": 12, "num_key_value_heads": 4},
    "no-qk-norm": {"qk_norm": False},
    "trainable-slopes": {"alibi_slopes_trainable": True},
    "linear-scaling": {"alibi_scaling": {"type": "linear", "factor": 4.0}},
}
each_backend = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def batching(**settings: Any) -> ContinuousBatchingConfig:
    """Returns settings: a cache of 1,600 tokens in pages of 16, and passes of 64 tokens, which cut long prompts."""
    return ContinuousBatchingConfig(**({"num_blocks": 100, "page_size": 16, "max_batch_tokens": 64} | settings))


def alone(model: AlibiGPTForCausalLM, prompt: list[int], max_new_tokens: int = 20) -> list[int]:
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)
    return tokens[0, len(prompt) :].tolist()


def together(
    model: AlibiGPTForCausalLM, requests: list[list[int]], max_new_tokens: int = 20, **settings: Any
) -> list[list[int]]:
    outputs = model.generate_batch(
        requests, max_new_tokens=max_new_tokens, continuous_batching_config=batching(**settings)
    )
    assert [output.error for output in outputs.values()] == [None] * len(requests)
    return [output.generated_tokens for output in outputs.values()]


@contextmanager
def sizes_of_passes(model: AlibiGPTForCausalLM) -> Iterator[list[int]]:
    """Yields the number of tokens in each pass, padding included."""
    sizes: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda layer, states: sizes.append(states[0].shape[1]))
    yield sizes
    hook.remove()


@each_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_requests_of_unequal_length(make_model: ModelFactory, shape: dict, backend: str) -> None:
    model, requests = make_model(**shape), prompts(LENGTHS)
    model.set_attn_implementation(backend)
    expected = [alone(model, prompt) for prompt in requests]
    with sizes_of_passes(model) as sizes:
        assert together(model, requests) == expected
    assert max(sizes) == 64
    assert together(model, requests, max_batch_tokens=1024) == expected


@each_backend
def test_probabilities_are_those_of_the_full_forward(make_model: ModelFactory, backend: str) -> None:
    model, requests = make_model(), prompts(LENGTHS)
    model.set_attn_implementation(backend)
    config = batching(return_logprobs=True)
    for prompt, output in zip(
        requests,
        model.generate_batch(requests, max_new_tokens=8, continuous_batching_config=config).values(),
        strict=True,
    ):
        logits = model(torch.tensor([prompt + output.generated_tokens[:-1]]), logits_to_keep=8).logits[0]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        tolerance = 1e-5 * logits.abs().max().item()
        torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=tolerance)


@each_backend
def test_requests_join_and_leave(make_model: ModelFactory, backend: str) -> None:
    """At most three requests run at once. They have different lengths, and end by the limit or by an end token."""
    model, requests = make_model(), prompts(LENGTHS)
    model.set_attn_implementation(backend)
    limits = [3, 10, 60, 1, 25, 7]
    model.generation_config.eos_token_id = alone(model, requests[2], 60)[40]
    expected = [alone(model, prompt, limit) for prompt, limit in zip(requests, limits, strict=True)]
    assert len(expected[2]) < 60
    config = batching(max_requests_per_batch=3)
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(requests, limits, strict=True)]
        outputs = [manager.get_result() for _ in names]
    found = {output.request_id: output.generated_tokens for output in outputs}
    assert [found[name] for name in names] == expected


@each_backend
def test_requests_share_the_pages_of_their_prefix(make_model: ModelFactory, backend: str) -> None:
    model = make_model()
    model.set_attn_implementation(backend)
    prefix, *ends = prompts([200, 5, 33, 64])
    requests = [prefix + end for end in ends]
    expected = [alone(model, prompt) for prompt in requests]
    with sizes_of_passes(model) as shared:
        assert together(model, requests) == expected
    with sizes_of_passes(model) as separate:
        assert together(model, requests, allow_block_sharing=False) == expected
    assert sum(separate) - sum(shared) == 2 * (200 - 200 % 16)


def test_requests_that_lose_their_pages_start_again(make_model: ModelFactory) -> None:
    model, requests = make_model(), prompts([5, 33, 64, 1, 130])
    expected = [alone(model, prompt, 60) for prompt in requests]
    with sizes_of_passes(model) as sizes:
        assert together(model, requests, 60, num_blocks=22) == expected
    assert sum(sizes) > sum(map(len, requests)) + 60 * len(requests)


@pytest.mark.slow
@each_backend
def test_padded_passes_of_a_compiled_model(make_model: ModelFactory, backend: str) -> None:
    model, requests = make_model(), prompts([5, 100, 33])
    model.set_attn_implementation(backend)
    expected = [alone(model, prompt, 6) for prompt in requests]
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=True)
    settings = {"varlen_compile_config": compiled, "q_padding_interval_size": 24, "kv_padding_interval_size": 256}
    with sizes_of_passes(model) as sizes:
        assert together(model, requests, 6, **settings) == expected
    assert {size % 24 for size in sizes} <= {0, 64 % 24}
    assert 24 in sizes


def test_sampled_sequences_of_one_prompt(make_model: ModelFactory) -> None:
    model, requests = make_model(), prompts([5, 33])
    config = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=20)
    outputs = model.generate_batch(requests, generation_config=config, continuous_batching_config=batching())
    found = [output.generated_tokens for output in outputs.values()]
    assert found == [alone(model, prompt) for prompt in requests for _ in range(2)]


@each_backend
def test_the_model_is_afterwards_what_it_was(make_model: ModelFactory, backend: str) -> None:
    model, requests = make_model(), prompts([33])
    model.set_attn_implementation(backend)
    config = model.generation_config.to_dict()
    logits = model(torch.tensor(requests)).logits
    together(model, requests)
    assert model.config._attn_implementation == backend
    assert model.generation_config.to_dict() == config
    assert torch.equal(model(torch.tensor(requests)).logits, logits)


def test_paged_eager_without_pages_is_eager(make_model: ModelFactory) -> None:
    model, input_ids = make_model(), torch.tensor(prompts([63]))
    model.set_attn_implementation("eager")
    expected = model(input_ids).logits
    model.set_attn_implementation("paged|eager")
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2", "kernels-community/flash-attn2"])
def test_an_implementation_that_does_not_add_the_bias_is_refused(make_model: ModelFactory, backend: str) -> None:
    model = make_model()
    model.config._attn_implementation = backend
    with pytest.raises(ValueError, match=f"not with {backend}; call model.set_attn_implementation"):
        model.generate_batch(prompts([5]), max_new_tokens=1, continuous_batching_config=batching())


def test_slopes_that_depend_on_the_length_are_refused(make_model: ModelFactory) -> None:
    model = make_model(alibi_scaling={"type": "dynamic"})
    with pytest.raises(ValueError, match="requests of different lengths"):
        model.generate_batch(prompts([5]), max_new_tokens=1, continuous_batching_config=batching())


def test_cuda_graphs_are_refused(make_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="leave out use_cuda_graph=True"):
        paged_config(make_model().config, batching(use_cuda_graph=True))


def test_flash_attention_does_not_come_by_itself(make_model: ModelFactory) -> None:
    given = batching()
    assert not paged_config(make_model().config, given).auto_switch_to_flash
    assert not paged_config(make_model().config, None).auto_switch_to_flash
    assert given == batching()


def bounds_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def test_the_layout_of_a_padded_pass() -> None:
    """The requests have 2 new tokens of 3, and 1 of 4. Padding adds an empty request, two queries and one key."""
    position_ids, mask = torch.tensor([[1, 2, 3, 0, 0]]), torch.zeros(1, 1, 5, 8)
    bounds = {"cu_seq_lens_q": bounds_of([2, 1, 0]), "cu_seq_lens_k": {"full_attention": bounds_of([3, 4, 0])}}
    layout = paged_layout(torch.ones(1), mask, position_ids, **bounds)
    assert layout.runs.query_sizes == [2, 1]
    assert layout.runs.key_sizes == [3, 4]
    assert layout.runs.queries.tolist() == [0, 1, 2]
    assert layout.runs.keys.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert layout.keys.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert torch.equal(layout.queries, position_ids)


def test_a_pass_without_a_mask_is_refused() -> None:
    bounds = {"cu_seq_lens_q": bounds_of([1]), "cu_seq_lens_k": {"full_attention": bounds_of([1])}}
    with pytest.raises(ValueError, match="meant for FlashAttention"):
        paged_layout(torch.ones(1), None, torch.zeros(1, 1), **bounds)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (12, 4)], ids=["6-heads", "12-heads-grouped"])
@pytest.mark.parametrize("windowed", [False, True], ids=["all-keys", "windows"])
def test_every_request_attends_as_the_formula_says(
    heads: int, kv_heads: int, windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "FEW_KEYS", 0)
    slopes, scaling = torch.tensor(alibi_slopes(heads)), 0.25
    shapes = [(1, heads, 21, 16), (1, kv_heads, 715, 16), (1, kv_heads, 715, 16)]
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    windows = head_windows(slopes, norm_bounds(query, key, scaling), 2.0**-24) if windowed else None
    requests = [(slice(0, 1), slice(0, 600)), (slice(1, 18), slice(600, 617)), (slice(18, 20), slice(617, 710))]
    runs = runs_of_bounds(bounds_of([1, 17, 2]), bounds_of([600, 17, 93]), 21, 715)
    output = attention_in_runs(AttentionInputs(query, key, value, slopes, scaling, 0.0, windows), runs)
    for queries, keys in requests:
        expected = oracle.attention(query[:, :, queries], key[:, :, keys], value[:, :, keys], slopes.tolist(), scaling)
        torch.testing.assert_close(output[:, :, queries].double(), expected, rtol=0, atol=1e-5)
    assert not output[:, :, 20:].any()
