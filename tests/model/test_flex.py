"""FlexAttention on the CPU against the float64 oracle. `test_gpu.py` has the tests that need a GPU.

The kernels are compiled here, which takes some ten seconds for each kind of input, and less where PyTorch finds
them in its cache. Beyond the most common kinds, tests are therefore marked slow.
"""

import shutil
from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import ModelFactory
from layouts import documents, end_of_cache, layout_of, same_document
from test_attention import SCALING, attend, padding, states, textbook
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from hf_alibi import AlibiGPTConfig
from hf_alibi.model import flex
from hf_alibi.model.flex import flex_attention_forward
from hf_alibi.model.inputs import AttentionInputs
from hf_alibi.model.layout import TokenLayout

# PyTorch's compiler imports a module that uses deprecated functions of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on the CPU needs a C++ compiler")
no_grad = torch.no_grad()


def assert_as_accurate_as_eager(inputs: tuple[Tensor, ...], layout: TokenLayout, visible: Tensor | None) -> None:
    """Compares in float32 with attention with a stored relative bias. Ignores rows that see nothing."""
    expected = oracle.attention(*inputs, oracle.paper_slopes(inputs[0].shape[1]), SCALING, visible)
    rows = expected.abs().sum((1, 3)) > 0  # [batch, queries]
    error, allowed = (
        (attend(backend, *inputs, layout) - expected).transpose(1, 2)[rows].abs().max()
        for backend in ("flex_attention", "eager")
    )
    assert error <= 2 * allowed


@compiles
@no_grad
def test_one_kernel_serves_all_lengths_and_one_all_chunks_at_the_end_of_a_cache() -> None:
    torch._dynamo.reset()
    counters.clear()
    for length in (300, 63, 111, 128, 700):
        inputs = states(6, 2, length, length, dtype=torch.float32)
        assert_as_accurate_as_eager(inputs, layout_of(6, 2, length), None)
    assert counters["stats"]["unique_graphs"] == 1
    for queries, keys in ((5, 300), (200, 700), (63, 111)):
        inputs = states(6, 2, queries, keys, dtype=torch.float32)
        assert_as_accurate_as_eager(inputs, end_of_cache(6, queries, keys), None)
    assert counters["stats"]["unique_graphs"] == 2


@compiles
@no_grad
@pytest.mark.parametrize("keys", [63, 128, 700])
def test_a_single_query_at_the_end_of_a_cache(keys: int) -> None:
    inputs = states(6, 2, 1, keys, dtype=torch.float32)
    assert_as_accurate_as_eager(inputs, end_of_cache(6, 1, keys), None)


@compiles
@no_grad
@pytest.mark.parametrize("length", [63, 300])
@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padding_changes_nothing(side: str, length: int) -> None:
    inputs = states(6, 2, length, length, batch=3, dtype=torch.float32)
    mask = padding(side, length)
    layout = layout_of(6, 3, length, mask)
    output = attend("flex_attention", *inputs, layout)
    assert output.isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        alone = [x[row : row + 1, :, real] for x in inputs]
        expected = oracle.attention(*alone, oracle.paper_slopes(6), SCALING)
        plain = attend("eager", *alone, layout_of(6, 1, int(real.sum())))
        error = (output[row : row + 1, :, real] - expected).abs().max()
        assert error <= 2 * (plain - expected).abs().max()


DOCUMENTS = {
    "short": documents([[20, 1, 42], [40, 23], [63]]),
    "across-blocks": documents([[1, 300, 399], [128, 128, 444], [700]]),
}


@compiles
@no_grad
@pytest.mark.parametrize("position_ids", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_packed_documents_do_not_see_each_other(position_ids: Tensor) -> None:
    length = position_ids.shape[1]
    inputs = states(6, 2, length, length, batch=3, dtype=torch.float32)
    layout = layout_of(6, 3, length, None, position_ids)
    assert_as_accurate_as_eager(inputs, layout, same_document(position_ids))


def dense(blocks: Tensor, queries: int, keys: int) -> Tensor:
    """Expands blocks `[batch, heads, rows, columns]` to `[batch, heads, queries, keys]`."""
    repeated = blocks.repeat_interleave(flex.BLOCK, 2).repeat_interleave(flex.BLOCK, 3)
    return repeated[:, :, :queries, :keys].bool()


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Returns the listed blocks as booleans `[batch, heads, rows, columns]`."""
    flags = torch.zeros_like(indices, dtype=torch.bool)
    return flags.scatter(-1, indices.long(), torch.arange(indices.shape[-1]) < counts[..., None])


long_hole = torch.ones(2, 1000, dtype=torch.long)
long_hole[0, 200:600] = long_hole[1, 300:310] = 0
LAYOUTS = {
    "whole-texts": layout_of(6, 2, 700),
    "one-block": layout_of(6, 2, 5),
    "end-of-cache": end_of_cache(6, 300, 1000),
    "left-padding": layout_of(6, 3, 700, padding("left", 700)),
    "right-padding": layout_of(6, 3, 700, padding("right", 700)),
    "hole": layout_of(6, 3, 700, padding("hole", 700)),
    "long-hole": layout_of(6, 2, 1000, long_hole),
    "documents": layout_of(6, 3, 700, None, DOCUMENTS["across-blocks"]),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_blocks_listed_are_those_with_a_visible_key_in_both_directions(layout: TokenLayout) -> None:
    queries, keys = layout.queries.shape[1], layout.keys.shape[1]
    batch = len(layout.visible(slice(None)))
    mask = flex._visibility(layout, batch, queries, keys).mask
    # The kernels for GPUs read each row as adjacent numbers.
    assert all(indices.is_contiguous() for indices in (mask.kv_indices, mask.full_kv_indices))
    assert all(indices.is_contiguous() for indices in (mask.q_indices, mask.full_q_indices))
    partial, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial.mT, listed(mask.q_num_blocks, mask.q_indices))
    assert torch.equal(whole.mT, listed(mask.full_q_num_blocks, mask.full_q_indices))
    real = torch.ones(batch, queries, dtype=torch.bool)
    if layout.query_mask is not None:
        real = layout.query_mask
    visible = layout.visible(slice(None)) & real[:, None, :, None]
    needed = torch.nn.functional.max_pool2d(visible.float(), flex.BLOCK, ceil_mode=True)
    assert torch.equal(dense(partial | whole, queries, keys), dense(needed, queries, keys))
    assert not (partial & whole).any()
    assert not (dense(whole, queries, keys) & ~visible).any()
    if min(queries, keys) > 2 * flex.BLOCK:
        assert whole.any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_windows_keep_all_blocks_within_and_few_beyond(layout: TokenLayout) -> None:
    windows = [1, 60, 128, 129, 300, 5000]
    queries, keys = layout.queries.shape[1], layout.keys.shape[1]
    mask = flex._visibility(layout, len(layout.visible(slice(None))), queries, keys).mask
    cut = flex._cut_short(mask, tuple(window // flex.BLOCK + 1 for window in windows))
    distance = (layout.queries[:, None, :, None] - layout.keys[:, None, None, :]).clamp(min=0)
    reach = torch.tensor(windows)[:, None, None]
    whole = dense(listed(mask.full_kv_num_blocks, mask.full_kv_indices), queries, keys)
    left = dense(listed(cut.full_kv_num_blocks, cut.full_kv_indices), queries, keys)
    left_by_column = dense(listed(cut.full_q_num_blocks, cut.full_q_indices).mT, queries, keys)
    for kept in (left, left_by_column):
        assert not (whole & ~kept & (distance <= reach)).any()
        assert not (kept & ~whole).any()
    # Otherwise, blocks of padding lie between the listed ones.
    contiguous = layout.key_mask is None
    assert not contiguous or not (left & (distance > reach + 3 * flex.BLOCK)).any()
    assert torch.equal(cut.kv_indices, mask.kv_indices.expand_as(cut.kv_indices))


@no_grad
def test_layers_share_their_masks() -> None:
    layout = layout_of(6, 2, 700)
    inputs = AttentionInputs(*states(6, 2, 700, 700, dtype=torch.float32), layout.slopes, SCALING)
    near, as_near = (torch.tensor(windows) for windows in ([1, 1, 1, 1, 200, 900], [9, 9, 9, 9, 201, 5000]))
    first, second, third, fourth = (
        flex._bias(inputs._replace(windows=windows), layout)[0] for windows in (None, None, near, as_near)
    )
    assert first is second
    assert third is fourth
    assert third is not first


def test_what_it_cannot_do_is_refused() -> None:
    module = SimpleNamespace(config=AlibiGPTConfig())
    inputs = states(6, 6, 5, 5, dtype=torch.float32)
    layout = layout_of(6, 2, 5)
    with pytest.raises(ValueError, match=r"no dropout, got attention_dropout=0\.1; set it to 0, or use sdpa"):
        flex_attention_forward(module, *inputs, layout, SCALING, dropout=0.1)
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64; use sdpa or eager"):
        flex_attention_forward(module, *(x.double() for x in inputs), layout, SCALING)
    for i in range(3):
        trained = [x.requires_grad_() if i == j else x.detach() for j, x in enumerate(inputs)]
        with pytest.raises(NotImplementedError, match=r"call the model under torch\.no_grad\(\), or use sdpa"):
            flex_attention_forward(module, *trained, layout, SCALING)
    trainable = layout._replace(slopes=layout.slopes.requires_grad_())
    with pytest.raises(NotImplementedError, match="no backward pass on the CPU"):
        flex_attention_forward(module, *(x.detach() for x in inputs), trainable, SCALING)


@compiles
@pytest.mark.slow
@no_grad
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 1), (12, 12), (20, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
def test_every_row_is_as_accurate_as_a_dense_relative_bias(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    length = 1100
    query, key, value = states(heads, kv_heads, length, length, batch=1, dtype=dtype)
    expected = oracle.attention(query, key, value, oracle.paper_slopes(heads), SCALING)
    output = attend("flex_attention", query, key, value, layout_of(heads, 1, length))
    error = (output - expected).abs().amax((0, 1, 3))
    allowed = (textbook(query, key, value, oracle.paper_slopes(heads)) - expected).abs().amax((0, 1, 3))
    factor = 2.0 if dtype == torch.float32 else 1.2
    for rows in torch.arange(length).chunk(16):
        assert error[rows].max() <= factor * allowed[rows].max()


@compiles
@pytest.mark.slow
@no_grad
def test_windows_change_the_output_by_less_than_promised() -> None:
    heads, length, tolerance = 6, 1500, 1e-3
    query, key, value = states(heads, 2, length, length, dtype=torch.float32)
    module = SimpleNamespace(config=AlibiGPTConfig(window_tolerance=tolerance, qk_norm=False))
    output = flex_attention_forward(module, query / 8, key, value, layout_of(heads, 2, length), SCALING)[0]
    everything = attend("flex_attention", query / 8, key, value, layout_of(heads, 2, length))
    difference = (output.transpose(1, 2) - everything).abs().max()
    assert 0 < difference <= 2 * tolerance * value.norm(dim=-1).max()


@compiles
@pytest.mark.slow
@no_grad
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_a_mask_of_the_callers_own_decides_who_sees_whom(additive: bool) -> None:
    for length in (63, 200):
        inputs = states(6, 2, length, length, batch=3, dtype=torch.float32)
        visible = torch.rand(3, length, length).tril() > 0.3
        visible |= torch.eye(length, dtype=torch.bool)
        mask = visible[:, None]
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        assert_as_accurate_as_eager(inputs, layout_of(6, 3, length, mask), visible)


@compiles
@pytest.mark.slow
@no_grad
@pytest.mark.parametrize("sizes", [[[3, 17], [8, 12]], [[3, 17]]], ids=["of-each-text", "of-all-texts"])
def test_documents_of_a_batch_are_continued_token_by_token(make_model: ModelFactory, sizes: list[list[int]]) -> None:
    model = make_model()
    input_ids = torch.randint(3, 97, (2, 20))
    position_ids = documents(sizes)
    model.set_attn_implementation("eager")
    expected = model(input_ids, position_ids=position_ids).logits
    model.set_attn_implementation("flex_attention")
    cache = DynamicCache(config=model.config)
    pieces = [
        model(input_ids[:, part], position_ids=position_ids[:, part], past_key_values=cache).logits
        for part in (slice(18), slice(18, 19), slice(19, 20))
    ]
    assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@compiles
@pytest.mark.slow
@no_grad
@pytest.mark.parametrize("heads", [(6, 6), (12, 4)], ids=["6-heads", "12-heads-grouped"])
def test_a_model_gives_the_logits_of_eager_with_every_cache(make_model: ModelFactory, heads: tuple[int, int]) -> None:
    model = make_model(num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_size=192)
    input_ids = torch.randint(3, 97, (2, 160))
    mask = torch.ones_like(input_ids)
    mask[0, :50] = 0
    model.set_attn_implementation("eager")
    expected = model(input_ids, attention_mask=mask).logits
    continued = model.generate(input_ids[:, :100], attention_mask=mask[:, :100], max_new_tokens=5)
    model.set_attn_implementation("flex_attention")
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=200)):
        ends = [100, 101, 102, 140, 160]
        pieces = [
            model(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        difference = (torch.cat(pieces, 1) - expected)[mask.bool()].abs().max()
        assert difference <= 1e-5 * expected.abs().max()
    assert torch.equal(continued, model.generate(input_ids[:, :100], attention_mask=mask[:, :100], max_new_tokens=5))


@no_grad
def test_a_compiled_model_has_no_graph_break(make_model: ModelFactory) -> None:
    """It is only traced, because PyTorch cannot generate code for FlexAttention in a compiled model on the CPU."""
    model = make_model()
    input_ids = torch.randint(3, 97, (2, 160))
    model.set_attn_implementation("eager")
    expected = model(input_ids).logits
    model.set_attn_implementation("flex_attention")
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
