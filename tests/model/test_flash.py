"""FlashAttention 2 without a GPU: the inputs of its kernels, and what is refused. `test_gpu.py` runs the kernels."""

import importlib.util
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import ModelFactory
from layouts import documents, end_of_cache, layout_of, same_document
from test_attention import SCALING, padding, states
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_alibi.model.flash import alibi_flash_attention
from hf_alibi.model.inputs import AttentionInputs
from hf_alibi.model.layout import Shared, TokenLayout

HEADS = 6
without_package = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None or importlib.util.find_spec("kernels") is not None,
    reason="FlashAttention 2 is installed",
)


def flash_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    alibi_slopes: Any,
) -> Tensor:
    """Computes attention as documented: `[batch, tokens, heads, head_dim]`, causal from the bottom right corner."""
    assert causal
    assert dropout_p == 0
    assert alibi_slopes.dtype == torch.float32
    states = (x.transpose(1, 2) for x in (query, key, value))
    return oracle.attention(*states, alibi_slopes.tolist(), softmax_scale).transpose(1, 2).to(query.dtype)


def flash_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """Computes attention as documented: as above for each of the concatenated sequences in `[tokens, ...]`."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    query_sizes, key_sizes = torch.diff(cu_seqlens_q), torch.diff(cu_seqlens_k)
    assert (max_seqlen_q, max_seqlen_k) == (query_sizes.max(), key_sizes.max())
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(query), len(key))
    queries, (keys, values) = query.split(query_sizes.tolist()), (x.split(key_sizes.tolist()) for x in (key, value))
    return torch.cat(
        [flash_attn_func(*(x[None] for x in run), **options)[0] for run in zip(queries, keys, values, strict=True)]
    )


def attend(inputs: list[Tensor], layout: TokenLayout) -> Tensor:
    """Returns the output `[batch, heads, queries, head_dim]` of the kernels above, in bfloat16."""
    query, key, value = (x.bfloat16() for x in inputs)
    call = AttentionInputs(query, key, value, layout.slopes, SCALING)
    output = alibi_flash_attention(call, layout, flash_attn_func, flash_attn_varlen_func)
    return output.transpose(1, 2)


def assert_equals_the_oracle(inputs: list[Tensor], layout: TokenLayout, visible: Tensor | None = None) -> None:
    """Asserts equality up to the rounding of the output."""
    exact = oracle.attention(*(x.bfloat16() for x in inputs), oracle.paper_slopes(HEADS), SCALING, visible)
    # Rows of queries that see some key.
    rows = exact.abs().sum((1, 3)) > 0
    output = attend(inputs, layout)
    assert output.isfinite().all()
    assert torch.equal(output.transpose(1, 2)[rows], exact.bfloat16().transpose(1, 2)[rows])


def test_whole_texts_and_the_end_of_a_cache() -> None:
    assert_equals_the_oracle(states(HEADS, 2, 63, 63), layout_of(HEADS, 2, 63))
    for queries in (1, 5):
        assert_equals_the_oracle(states(HEADS, 2, queries, 63), end_of_cache(HEADS, queries, 63))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_out(side: str) -> None:
    mask = padding(side, 63)
    visible = mask[:, None, :].bool() & mask[:, :, None].bool()
    assert_equals_the_oracle(states(HEADS, 2, 63, 63, batch=3), layout_of(HEADS, 3, 63, mask), visible)


def test_documents_are_runs() -> None:
    position_ids = documents([[20, 1, 42], [40, 23], [63]])
    layout = layout_of(HEADS, 3, 63, None, position_ids)
    assert_equals_the_oracle(states(HEADS, 2, 63, 63, batch=3), layout, same_document(position_ids))
    runs = layout.all_runs(3)
    assert runs is layout.runs
    assert runs.queries is None
    assert runs.keys is None
    assert runs.query_sizes == runs.key_sizes == [20, 1, 42, 40, 23, 63]


def test_padding_that_a_text_goes_on_from_is_a_run_of_its_own() -> None:
    """Its keys are those of the text before it. Other padding is in no run."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])
    runs = layout_of(HEADS, 3, 6, mask).all_runs(3)
    assert runs.query_sizes == [3, 1, 4, 2, 3]
    assert runs.key_sizes == [3, 3, 4, 2, 4]
    assert runs.queries.tolist() == [0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 15, 16, 17]
    assert runs.keys.tolist() == [0, 1, 2, 0, 1, 2, 8, 9, 10, 11, 12, 13, 12, 13, 16, 17]


@pytest.mark.parametrize("queries", [1, 9, 40])
@pytest.mark.parametrize("side", ["left", "hole"])
@pytest.mark.parametrize("with_documents", [False, True], ids=["one-document", "documents"])
def test_cached_tokens_with_padding_and_documents(side: str, queries: int, with_documents: bool) -> None:
    """The outputs are those of the last queries in a full forward pass."""
    length = 63
    position_ids = documents([[30, 33], [25, 38], [60, 3]]) if with_documents else None
    mask = padding(side, length)
    full = layout_of(HEADS, 3, length, mask, position_ids)
    names = [name for name in ("queries", "first", "query_mask") if getattr(full, name) is not None]
    last = {name: getattr(full, name)[:, -queries:] for name in names}
    layout = full._replace(**last, runs=None, shared=Shared())
    query, key, value = states(HEADS, 2, length, length, batch=3)
    real = mask[:, -queries:].bool()
    output = attend([query[:, :, -queries:], key, value], layout)
    states_in_bfloat16 = (x.bfloat16() for x in (query, key, value))
    for row, (q, k, v) in enumerate(zip(*states_in_bfloat16, strict=True)):
        kept = mask[row].bool()
        starts = torch.zeros(length, dtype=torch.long) if full.first is None else full.first[row].clamp(min=0)
        positions = full.keys.expand(3, -1)[row, kept]
        visible = positions[None, None] >= starts[kept][None, :, None]
        exact = oracle.attention(*(x[None, :, kept] for x in (q, k, v)), oracle.paper_slopes(HEADS), SCALING, visible)
        count = int(real[row].sum())
        expected = exact[0, :, exact.shape[2] - count :].bfloat16()
        assert torch.equal(output[row][:, real[row]], expected)


def test_what_it_cannot_do_is_refused() -> None:
    inputs = states(HEADS, 2, 5, 5, dtype=torch.float32)
    layout = layout_of(HEADS, 2, 5)
    kernels = (flash_attn_func, flash_attn_varlen_func)
    with pytest.raises(ValueError, match=r"bfloat16 and float16, not in torch\.float32"):
        alibi_flash_attention(AttentionInputs(*inputs, layout.slopes, SCALING), layout, *kernels)
    masked = layout_of(HEADS, 2, 5, torch.ones(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got one of shape \(2, 1, 5, 5\); use sdpa"):
        attend(inputs, masked)
    with pytest.raises(ValueError, match="no gradient for slopes; train them with sdpa"):
        attend(inputs, layout._replace(slopes=layout.slopes.requires_grad_()))


@without_package
@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_asking_for_it_says_how_to_get_it(make_model: ModelFactory, tmp_path: Path, name: str) -> None:
    model = make_model()
    with pytest.raises(ImportError, match="`pip install flash-attn`"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    # Transformers 5.19 does not notice it a second time, before the kernel is called.
    with pytest.raises(ImportError, match="`pip install flash-attn`"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(torch.ones(1, 9, dtype=torch.long))


def test_versions_without_alibi_are_refused_at_once(make_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match='"flash_attention_3"` is not supported: it does not know ALiBi'):
        make_model().set_attn_implementation("flash_attention_3")
