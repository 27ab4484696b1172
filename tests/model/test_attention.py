"""Every attention implementation against the float64 oracle: forward, gradients, padding, packing, masks.

A tolerance is a small multiple of the error that the textbook implementation (a stored relative bias, PyTorch's plain
operations) makes in the same dtype on the same input.
"""

import math
from types import SimpleNamespace

import oracle
import pytest
import torch
from torch import Tensor, nn

from hf_alibi import AlibiGPTConfig
from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.model.attention import backend as backend_of
from hf_alibi.model.layout import Shared, TokenLayout, token_layout

BACKENDS = ["eager", "sdpa"]
# Query heads, key-value heads and length.
SHAPES = [(6, 6, 1), (6, 2, 63), (12, 12, 111), (20, 4, 63), (8, 1, 111), (6, 6, 1100)]
HEAD_DIM = 16
SCALING = HEAD_DIM**-0.5


def states(
    heads: int, kv_heads: int, queries: int, keys: int, batch: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries + keys)
    query = 2 * torch.randn(batch, heads, queries, HEAD_DIM, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, keys, HEAD_DIM, dtype=dtype) for _ in range(2))
    return query, key, value


def layout_of(
    heads: int, batch: int, queries: int, mask: Tensor | None = None, position_ids: Tensor | None = None
) -> TokenLayout:
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    return token_layout(slopes, torch.empty(batch, queries, 1), mask, position_ids, None)


def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    module = SimpleNamespace(config=AlibiGPTConfig(window_tolerance=0))
    attention = backend_of(backend).forward
    output, weights = attention(module, query, key, value, layout, scaling=SCALING)
    assert (weights is not None) == (backend == "eager")
    return output.transpose(1, 2)


def textbook(query: Tensor, key: Tensor, value: Tensor, slopes: list[float]) -> Tensor:
    """Computes attention with a stored relative bias and plain operations, all in the dtype of the queries."""
    groups = query.shape[1] // key.shape[1]
    i = torch.arange(query.shape[2])
    bias = -torch.tensor(slopes)[:, None, None] * (i[:, None] - i)
    bias = bias.masked_fill(i[:, None] < i, -math.inf).to(query.dtype)
    return nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), bias[None], scale=SCALING
    )


@pytest.mark.parametrize(("heads", "kv_heads", "length"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients_equal_the_oracle_in_float64(
    backend: str, heads: int, kv_heads: int, length: int
) -> None:
    inputs = [x.requires_grad_() for x in states(heads, kv_heads, length, length)]
    output = attend(backend, *inputs, layout_of(heads, 2, length))
    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, inputs, direction)
    for gradient, true in zip(gradients, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "mask", [None, torch.ones(2, 1700).index_fill(1, torch.tensor([0, 1]), 0)], ids=["", "padded"]
)
# Backward cuts the many queries of a single head in pieces.
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(6, 2, 63), (12, 12, 111), (6, 6, 1100), (1, 1, 1700)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_trainable_slopes_equal_the_oracle(
    backend: str, heads: int, kv_heads: int, length: int, mask: Tensor | None
) -> None:
    inputs = states(heads, kv_heads, length, length)
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64, requires_grad=True)
    layout = layout_of(heads, 2, length, None if mask is None else mask[:, :length])._replace(slopes=slopes)
    output = attend(backend, *inputs, layout)
    visible = None if mask is None else (mask[:, None, :length] > 0).expand(-1, length, -1)
    true_slopes = [slope.clone().detach().requires_grad_() for slope in slopes]
    expected = oracle.attention(*inputs, true_slopes, SCALING, visible)
    direction = torch.randn_like(expected)
    # The first two rows are padding.
    direction[:, :, :2] = 0
    (gradient,) = torch.autograd.grad(output, slopes, direction)
    true = torch.stack(torch.autograd.grad(expected, true_slopes, direction))
    torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
def test_gradients_of_trainable_slopes_are_as_accurate_as_those_of_eager_in_16_bits(dtype: torch.dtype) -> None:
    """bfloat16 can represent neither positions beyond 256 nor a sum in which large terms cancel."""
    heads, length = 6, 1100
    inputs = states(heads, heads, length, length, dtype=dtype)
    slopes = torch.tensor(alibi_slopes(heads), requires_grad=True)
    layout = layout_of(heads, 2, length)._replace(slopes=slopes)
    true_slopes = [slope.double().detach().requires_grad_() for slope in slopes]
    expected = oracle.attention(*inputs, true_slopes, SCALING)
    direction = torch.randn_like(expected)
    true = torch.stack(torch.autograd.grad(expected, true_slopes, direction))
    error = {}
    for backend in BACKENDS:
        (gradient,) = torch.autograd.grad(attend(backend, *inputs, layout), slopes, direction.to(dtype))
        error[backend] = (gradient - true).norm()
    assert error["sdpa"] <= 1.2 * error["eager"]


def test_gradients_of_trainable_slopes_are_as_exact_in_long_texts() -> None:
    """Distant keys that a steep head does not see add no rounding error."""
    heads, length = 6, 1500
    inputs = states(heads, heads, length, length, batch=1, dtype=torch.float32)
    slopes = torch.tensor(alibi_slopes(heads), requires_grad=True)
    layout = layout_of(heads, 1, length)._replace(slopes=slopes)
    true_slopes = [slope.double().detach().requires_grad_() for slope in slopes]
    outputs = [oracle.attention(*inputs, true_slopes, SCALING)]
    outputs += [attend(backend, *inputs, layout) for backend in BACKENDS]
    errors = []
    # A single error can be small by chance.
    for _ in range(3):
        direction = torch.randn_like(outputs[0])
        true, *gradients = (
            torch.stack(torch.autograd.grad((output * direction).sum(), true_slopes, retain_graph=True))
            if output is outputs[0]
            else torch.autograd.grad((output.double() * direction).sum(), slopes, retain_graph=True)[0]
            for output in outputs
        )
        errors.append(torch.stack([gradient - true for gradient in gradients]))
    of_eager, of_sdpa = torch.stack(errors).norm(dim=0)  # [heads]
    assert (of_sdpa <= 20 * of_eager).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(6, 6, 1100), (12, 4, 111)])
def test_gradients_are_as_accurate_as_those_of_a_dense_relative_bias(
    heads: int, kv_heads: int, length: int, backend: str, dtype: torch.dtype
) -> None:
    inputs = [x.requires_grad_() for x in states(heads, kv_heads, length, length, dtype=dtype)]
    layout = layout_of(heads, 2, length)
    layout = layout._replace(slopes=layout.slopes.float())
    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING)
    direction = torch.randn(expected.shape).to(dtype)
    outputs = (expected, attend(backend, *inputs, layout), textbook(*inputs, oracle.paper_slopes(heads)))
    gradients = (torch.autograd.grad(output, inputs, direction.to(output.dtype)) for output in outputs)
    for true, actual, dense in zip(*gradients, strict=True):
        assert (actual - true).norm() <= 1.2 * (dense - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_is_as_accurate_as_a_dense_relative_bias(backend: str, dtype: torch.dtype) -> None:
    heads, length = 3, 8192 if backend == "sdpa" else 2048
    query, key, value = states(heads, heads, length, length, batch=1, dtype=dtype)
    expected = oracle.attention(query, key, value, oracle.paper_slopes(heads), SCALING)
    layout = layout_of(heads, 1, length)
    layout = layout._replace(slopes=layout.slopes.float())
    error = (attend(backend, query, key, value, layout) - expected).abs().amax((0, 1, 3))
    allowed = (textbook(query, key, value, oracle.paper_slopes(heads)) - expected).abs().amax((0, 1, 3))
    factor = 2.0 if dtype == torch.float32 else 1.2
    # Compares within groups of rows. A maximum over all rows would only test the least accurate ones.
    for rows in torch.arange(length).chunk(16):
        assert error[rows].max() <= factor * allowed[rows].max()


@pytest.mark.parametrize("queries", [1, 5, 63])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_at_the_end_of_a_cache_get_their_rows(backend: str, queries: int) -> None:
    heads, keys = 12, 111
    query, key, value = states(heads, heads, queries, keys)
    positions = torch.arange(keys)[None]
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    layout = TokenLayout(slopes, positions[:, -queries:], positions, Shared(), length=keys)
    expected = oracle.attention(query, key, value, oracle.paper_slopes(heads), SCALING)
    torch.testing.assert_close(attend(backend, query, key, value, layout), expected, rtol=0, atol=1e-13)


def padding(side: str, length: int) -> Tensor:
    mask = torch.ones(3, length, dtype=torch.long)
    for row, pads in enumerate((0, 7, length - 1)):
        mask[row, slice(None, pads) if side == "left" else slice(length - pads, None)] = 0
    if side == "hole":
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, 20:31] = mask[2, 5] = 0
    return mask


@pytest.mark.parametrize("side", ["left", "right", "hole"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend: str, side: str) -> None:
    heads, length = 6, 63
    inputs = states(heads, 2, length, length, batch=3)
    mask = padding(side, length)
    output = attend(backend, *inputs, layout_of(heads, 3, length, mask))
    for row in range(3):
        real = mask[row].bool()
        alone = (x[row : row + 1, :, real] for x in inputs)
        expected = oracle.attention(*alone, oracle.paper_slopes(heads), SCALING)
        torch.testing.assert_close(output[row : row + 1, :, real], expected, rtol=0, atol=1e-13)
    assert output.isfinite().all()


DOCUMENTS = {"three": [20, 1, 42], "every-token": [1] * 63, "one": [63]}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("with_mask", [False, True], ids=["no-mask", "mask-of-ones"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(backend: str, with_mask: bool, documents: list[int]) -> None:
    heads, length = 12, 63
    inputs = [x.requires_grad_() for x in states(heads, heads, length, length, batch=2)]
    position_ids = torch.cat([torch.arange(n) for n in documents])[None].repeat(2, 1)
    # Each row has different documents.
    position_ids[1] = torch.cat([torch.arange(40), torch.arange(23)])
    mask = torch.ones(2, length) if with_mask else None
    output = attend(backend, *inputs, layout_of(heads, 2, length, mask, position_ids))
    document = (position_ids == 0).cumsum(1)
    visible = document[:, :, None] == document[:, None, :]
    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING, visible)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    gradients = torch.autograd.grad(output.sum(), inputs)
    for gradient, true in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)


def test_packed_documents_with_left_padding_stay_exact_in_both_backends() -> None:
    heads, length = 6, 63
    inputs = states(heads, heads, length, length, batch=1)
    position_ids = torch.cat([torch.ones(9, dtype=torch.long), torch.arange(30), torch.arange(24)])[None]
    mask = (torch.arange(length) >= 9)[None]
    layout = layout_of(heads, 1, length, mask, position_ids)
    assert layout.runs is not None
    assert layout.runs.query_sizes == layout.runs.key_sizes == [30, 24]
    assert torch.equal(layout.runs.queries, torch.arange(9, 63))
    assert torch.equal(layout.runs.keys, torch.arange(9, 63))
    document = torch.tensor([0] * 9 + [1] * 30 + [2] * 24)
    visible = (document[:, None] == document) & mask
    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING, visible[None])
    for backend in BACKENDS:
        output = attend(backend, *inputs, layout)[:, :, 9:]
        torch.testing.assert_close(output, expected[:, :, 9:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["boolean", "additive", "additive-minus-infinity"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_the_callers_own_decides_who_sees_whom(backend: str, kind: str) -> None:
    heads, length = 6, 63
    inputs = states(heads, heads, length, length, batch=2)
    visible = torch.rand(2, length, length).tril() > 0.3
    visible |= torch.eye(length, dtype=torch.bool)
    hidden = -math.inf if kind.endswith("infinity") else torch.finfo(torch.float64).min
    mask = (
        visible[:, None]
        if kind == "boolean"
        else torch.zeros(2, 1, length, length).double().masked_fill(~visible[:, None], hidden)
    )
    output = attend(backend, *inputs, layout_of(heads, 2, length, mask))
    expected = oracle.attention(*inputs, oracle.paper_slopes(heads), SCALING, visible)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_gives_no_nan(backend: str, dtype: torch.dtype) -> None:
    inputs = states(6, 6, 63, 63, dtype=dtype)
    mask = torch.zeros(2, 1, 63, 63, dtype=dtype).fill_(torch.finfo(dtype).min)
    layout = layout_of(6, 2, 63, mask)
    layout = layout._replace(slopes=layout.slopes.float())
    assert attend(backend, *inputs, layout).isfinite().all()


@pytest.mark.parametrize("name", ["flash_attention_3", "paged|sdpa", "nonsense"])
def test_an_implementation_without_alibi_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not know ALiBi"):
        backend_of(name)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="the 5 queries and 5 keys"):
        layout_of(6, 1, 5, torch.ones(1, 1, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        layout_of(6, 1, 5, torch.ones(1, 1, 5, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="covers 4 tokens"):
        layout_of(6, 1, 5, torch.ones(1, 4))
    for shape in [(5,), (1, 5, 5), (2, 5)]:
        with pytest.raises(ValueError, match=r"it must be \[3, tokens\]"):
            layout_of(6, 3, 5, torch.ones(shape))


def test_a_mask_can_be_for_all_sequences() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    found, expected = layout_of(6, 3, 5, mask), layout_of(6, 3, 5, mask.expand(3, -1))
    for name in ("queries", "keys", "key_mask", "query_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.runs is not None
    assert found.runs.query_sizes == [3, 3, 3]
    assert torch.equal(found.runs.keys, expected.runs.keys)
