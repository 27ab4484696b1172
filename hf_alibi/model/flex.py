"""FlexAttention with ALiBi: a function adds the bias to each score, and blocks of hidden keys are skipped.

A query sees the keys from the start of its document up to itself. So each pair of a block of queries and a block of
keys is hidden, fully visible or partially visible. The kernel gets a list of the full blocks and one of the partial
blocks, and masks single keys only in partial blocks. Full blocks are listed from near to far. A head's window
therefore only shortens this list: whatever follows n full blocks is at least n blocks away.

The lists are built once for all layers of a forward pass, and the kernel is compiled once for all lengths. The forward
pass runs on CPUs and GPUs, the backward pass on GPUs only.

Source: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(arXiv 2412.05496).
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import AttentionInputs, attention_inputs, without_autocast
from .layout import TokenLayout
from .private_torch import MASKED_INDEX
from .recording import is_compiled
from .tiles import QUERY_BLOCK

# FlexAttention is a prototype in PyTorch. It is imported only where it is used, so that a checkpoint loads without it.
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Queries or keys per block, the default size of FlexAttention. Larger blocks compute more masked scores, smaller ones
# make longer lists.
BLOCK = 128
# Queries times keys from which windows are used on a GPU. They become numbers in Python, so the CPU waits for the GPU.
# docs/speed.md has the measurement.
MANY_PAIRS = 8192**2
# Greater than any position, yet small enough for differences of two such numbers in int32.
HIDDEN = 2**30


class Visibility(NamedTuple):
    """Distances and block mask, which all layers of a forward pass share."""

    distance: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask: "BlockMask"


def flex_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention with FlexAttention. The arguments are those of `eager_attention_forward`.

    Returns:
        The output `[batch, queries, heads, head_dim]`, and `None` in place of attention weights.

    Raises:
        ValueError: If `dropout` is not 0 or the dtype is float64.
        NotImplementedError: If gradients are needed on the CPU.
    """
    layout = attention_mask
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got attention_dropout={dropout}; set it to 0, or use sdpa.")
    inputs = attention_inputs(query, key, value, layout, scaling, dropout)
    is_worth_it = query.device.type == "cpu" or query.shape[2] * key.shape[2] >= MANY_PAIRS
    # A compiled graph does not allow windows, because they become Python numbers.
    if not is_compiled() and query.shape[2] >= QUERY_BLOCK and is_worth_it:
        inputs = inputs.with_lossless_windows(module.config.window_tolerance)
    with without_autocast(query.device.type):
        output = alibi_flex_attention(inputs, layout)
    return output.transpose(1, 2).contiguous(), None


def alibi_flex_attention(inputs: AttentionInputs, layout: TokenLayout) -> Tensor:
    """Computes attention with FlexAttention.

    Returns:
        `[batch, heads, queries, head_dim]`. Queries that see nothing get zeros, unless `layout.mask` hides the keys.

    Raises:
        ValueError: If the dtype is float64.
        NotImplementedError: If gradients are needed on the CPU.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if query.dtype == torch.float64:
        raise ValueError("flex_attention has no kernel for torch.float64; use sdpa or eager.")
    tensors = (query, key, value, inputs.slopes)
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(states.requires_grad for states in tensors):
        raise NotImplementedError(
            "flex_attention has no backward pass on the CPU; call the model under torch.no_grad(), or use sdpa."
        )
    mask, biased = _bias(inputs, layout)
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention if is_compiled() else _compiled_flex_attention()
    return attend(
        query,
        key,
        value,
        score_mod=biased,
        block_mask=mask,
        scale=inputs.scaling,
        # The comparison works on symbolic sizes while a graph is compiled; `bool()` would need their values.
        enable_gqa=True if query.shape[1] != key.shape[1] else False,  # noqa: SIM210
        # PyTorch's kernel for few queries fails where many heads share keys. It is used for a single query only,
        # where it saves most.
        kernel_options={"BACKEND": "TRITON"} if query.shape[2] > 1 else None,
    )


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Returns compiled FlexAttention. It recompiles by kind: dtype, one query or several, padding, gradients.

    There are more kinds than Dynamo's default limit of recompilations, beyond which a call would raise an error.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(  # type: ignore[call-overload]  # its overloads lack recompile_limit
        flex_attention, dynamic=True, fullgraph=True, recompile_limit=64
    )


def _bias(inputs: AttentionInputs, layout: TokenLayout) -> "tuple[BlockMask | None, Callable[..., Tensor]]":
    """Returns the mask of blocks to compute (`None`: all), and the function that adds the bias to a score."""
    query, key, windows = inputs.query, inputs.key, inputs.windows
    if layout.mask is not None:
        bias = _lookup(layout.dense_bias(inputs.slopes, slice(None)).expand(len(query), -1, -1, -1))
        return None, lambda score, b, h, q, k: score + bias(b, h, q, k)

    shared = layout.shared
    if shared.blocks is None:
        shared.blocks = _visibility(layout, len(query), query.shape[2], key.shape[2])
    distance, mask = shared.blocks
    if windows is not None:
        limits = tuple(min(window // BLOCK + 1, mask.kv_indices.shape[-1]) for window in windows.tolist())
        if limits not in shared.near_blocks:
            shared.near_blocks[limits] = _cut_short(mask, limits)
        mask = shared.near_blocks[limits]
    slope = _lookup(inputs.slopes)
    return mask, lambda score, b, h, q, k: score - slope(h) * distance(b, q, k)


def _visibility(layout: TokenLayout, batch: int, num_queries: int, num_keys: int) -> Visibility:
    """Computes distances and block mask, from indices alone if only the future is hidden."""
    device = layout.keys.device
    if layout.length is not None:
        keys = torch.arange(num_keys, dtype=torch.int32, device=device)[None]
        queries = keys[:, num_keys - num_queries :]
        past = torch.full((), num_keys - num_queries, dtype=torch.int32, device=device)
        mask = _block_mask(queries, keys, torch.zeros_like(queries), lambda b, h, q, k: k <= q + past)
        return Visibility(lambda b, q, k: q + past - k, mask)

    queries, keys = layout.queries.int(), layout.keys.int()
    if layout.key_mask is not None and layout.query_mask is not None:
        # Padding whose output is unused would see the keys of the token before it. Hiding everything saves blocks.
        queries = queries.masked_fill(~layout.query_mask, -HIDDEN)
        keys = keys.masked_fill(~layout.key_mask, HIDDEN)
    queries, keys = queries.expand(batch, -1), keys.expand(batch, -1)
    lowest = torch.zeros_like(queries) if layout.first is None else layout.first.int()
    position, other, start = _lookup(queries), _lookup(keys), _lookup(lowest)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (other(b, k) <= position(b, q)) & (other(b, k) >= start(b, q))

    mask = _block_mask(queries, keys, lowest, visible)
    return Visibility(lambda b, q, k: position(b, q) - other(b, k), mask)


def _lookup(table: Tensor) -> Callable[..., Tensor]:
    """Returns a function that takes one index per dimension and returns the element of `table`."""
    if table.device.type != "cpu" or MASKED_INDEX is None:
        return lambda *index: table[index]
    # PyTorch's CPU template sometimes corrupts the names of sizes in the code that it generates. So this function
    # avoids sizes: strides are tensors, and the masked operator does not check the index.
    # `flatten` alone would leave a repeated single column an expanded view.
    flat = table.flatten().contiguous()
    strides = [torch.tensor(stride) for stride in table.contiguous().stride()]

    def element(*index: Tensor) -> Tensor:
        offset = sum(i * stride for i, stride in zip(index, strides, strict=True))
        return MASKED_INDEX(flat, index[-1] >= 0, [offset], 0)

    return element


def _block_mask(queries: Tensor, keys: Tensor, lowest: Tensor, visible: Callable[..., Tensor]) -> "BlockMask":
    """Returns a mask that lists the blocks of keys for each block of queries, and vice versa.

    Args:
        queries: `[batch or 1, queries]`, positions; -HIDDEN for a query that sees nothing.
        keys: `[batch or 1, keys]`, positions; HIDDEN for a key that no query sees.
        lowest: `[batch or 1, queries]`, the lowest position that each query sees.
        visible: Returns whether a single query sees a single key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first_key, last_key = _extremes(keys, HIDDEN)
    _, last_real_key = _extremes(keys.masked_fill(keys == HIDDEN, -HIDDEN), -HIDDEN)
    first_query, last_query = (x.mT for x in _extremes(queries, -HIDDEN))
    first_lowest, last_lowest = (x.mT for x in _extremes(lowest, HIDDEN))
    needed = (first_key <= last_query) & (last_real_key >= first_lowest)
    whole = (last_key <= first_query) & (first_key >= last_lowest)
    partial = needed & ~whole
    return BlockMask(
        (queries.shape[1], keys.shape[1]),
        *_listed(partial),
        *_listed(whole, descending=True),
        *_listed(partial.mT),
        *_listed(whole.mT),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _extremes(positions: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """Returns the lowest and highest position of each block, `[batch, 1, 1, blocks]`.

    Args:
        positions: `[batch, tokens]`.
        fill: Position with which the last block is filled up.
    """
    # At least 2 blocks, because the compiler treats a size of 1 as a constant.
    num_blocks = max(2, -(-positions.shape[1] // BLOCK))
    padded = F.pad(positions, (0, num_blocks * BLOCK - positions.shape[1]), value=fill)
    lowest, highest = padded.view(len(positions), 1, 1, num_blocks, BLOCK).aminmax(dim=-1)
    return lowest, highest


def _listed(blocks: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the number of true values in each row, and the indices of the row, those of true values first.

    Args:
        blocks: `[batch, heads, rows, columns]`, boolean.
        descending: Whether the indices of true values descend.
    """
    # Sorting keeps the strides of its input, and the kernel reads each row as adjacent numbers.
    blocks = blocks.contiguous()
    last = blocks.shape[-1] - 1
    order = torch.argsort(blocks.flip(-1).int() if descending else blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), (last - order if descending else order).int()


def _cut_short(mask: "BlockMask", limits: tuple[int, ...]) -> "BlockMask":
    """Returns a mask with heads that keeps only the nearest `limits[head]` full blocks of each head."""
    from torch.nn.attention.flex_attention import BlockMask

    limit = torch.tensor(limits, dtype=torch.int32, device=mask.kv_indices.device)[:, None]

    def for_heads(lists: Tensor | None) -> Tensor:
        assert lists is not None
        return lists.expand(-1, len(limits), *lists.shape[2:]).contiguous()

    return BlockMask(
        mask.seq_lengths,
        for_heads(mask.kv_num_blocks),
        for_heads(mask.kv_indices),
        for_heads(mask.full_kv_num_blocks).minimum(limit),
        for_heads(mask.full_kv_indices),
        for_heads(mask.q_num_blocks),
        for_heads(mask.q_indices),
        for_heads(mask.full_q_num_blocks).minimum(limit),
        for_heads(mask.full_q_indices),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
    )
