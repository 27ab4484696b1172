"""FlexAttention with ALiBi: the bias as a modification of the scores, hidden keys as blocks that are skipped.

A query sees the keys from the start of its document up to itself. For every block of queries and block of keys
this tells whether they are hidden from each other, visible as a whole, or visible in part; the kernel gets lists
of the latter two, and looks at single keys only in the last. The lists of whole blocks go from near to far, so
that a head's window does no more than cut them short: what comes after n whole blocks is at least n blocks away.

The lists are made once for all layers of a forward pass, and the kernel is compiled once for all lengths. It runs
forward on CPUs and GPUs, backward on GPUs.

Source: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(arXiv 2412.05496).
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import QUERY_BLOCK, AttentionInputs, attention_inputs
from .layout import TokenLayout
from .private_torch import MASKED_INDEX
from .recording import is_compiled

# FlexAttention is a prototype in PyTorch, and a checkpoint must load without it: it is imported where it is used.
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries or keys in a block
FAR = 2**30  # further than any position


class Visibility(NamedTuple):
    """What all layers of a forward pass share: distances, and which keys each query sees."""

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
    """Attention through FlexAttention; arguments as in `eager_attention_forward`, but no weights.

    Raises:
        ValueError: For dropout and for float64.
        NotImplementedError: If gradients are needed on the CPU.
    """
    layout = attention_mask
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got attention_dropout={dropout}; use 0, or sdpa.")
    inputs = attention_inputs(module, query, key, value, layout, scaling, dropout)
    # A few queries are not worth waiting for the windows, and a compiled graph cannot wait for them.
    if not is_compiled() and query.shape[2] >= QUERY_BLOCK:
        inputs = inputs.with_lossless_windows(module.config.window_tolerance)
    with torch.autocast(query.device.type, enabled=False):
        output = alibi_flex_attention(inputs, layout)
    return output.transpose(1, 2).contiguous(), None


def alibi_flex_attention(inputs: AttentionInputs, layout: TokenLayout) -> Tensor:
    """Attention through FlexAttention.

    Returns:
        `[batch, heads, queries, head_dim]`; queries that see nothing get zeros, unless `layout.mask` hides the keys.

    Raises:
        ValueError: For float64.
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
        # Decides on symbols while a graph is compiled; `bool()` would ask for their values.
        enable_gqa=True if query.shape[1] != key.shape[1] else False,  # noqa: SIM210
        # The kernel for short queries fails where many heads share keys; a single query needs it most.
        kernel_options={"BACKEND": "TRITON"} if query.shape[2] > 1 else None,
    )


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention, compiled anew only for what differs in kind: dtype, one query or several, padding, gradients.

    Dynamo's usual limit would allow for too few kinds; beyond it, the call raises.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(  # type: ignore[call-overload]  # its overloads lack recompile_limit
        flex_attention, dynamic=True, fullgraph=True, recompile_limit=64
    )


def _bias(inputs: AttentionInputs, layout: TokenLayout) -> "tuple[BlockMask | None, Callable[..., Tensor]]":
    """Returns which blocks to compute, and the function that adds the bias to a score."""
    query, key, windows = inputs.query, inputs.key, inputs.windows
    if layout.mask is not None:
        bias = _lookup(layout.dense_bias(inputs.slopes).expand(len(query), -1, -1, -1))
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
    """Works out distances and blocks, from slots alone if nothing but the future is hidden."""
    device = layout.keys.device
    if layout.length is not None:
        keys = torch.arange(num_keys, dtype=torch.int32, device=device)[None]
        queries = keys[:, num_keys - num_queries :]
        past = torch.full((), num_keys - num_queries, dtype=torch.int32, device=device)
        mask = _block_mask(queries, keys, torch.zeros_like(queries), lambda b, h, q, k: k <= q + past)
        return Visibility(lambda b, q, k: q + past - k, mask)

    queries, keys = layout.queries.int(), layout.keys.int()
    if layout.key_mask is not None and layout.query_mask is not None:
        # Padding of which nothing is asked would see what the token before it sees; it is not worth a block.
        queries = queries.masked_fill(~layout.query_mask, -FAR)
        keys = keys.masked_fill(~layout.key_mask, FAR)
    queries, keys = queries.expand(batch, -1), keys.expand(batch, -1)
    lowest = torch.zeros_like(queries) if layout.first is None else layout.first.int()
    position, other, start = _lookup(queries), _lookup(keys), _lookup(lowest)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (other(b, k) <= position(b, q)) & (other(b, k) >= start(b, q))

    mask = _block_mask(queries, keys, lowest, visible)
    return Visibility(lambda b, q, k: position(b, q) - other(b, k), mask)


def _lookup(table: Tensor) -> Callable[..., Tensor]:
    """Returns a function from indices, one for each dimension, to an element of `table`."""
    if table.device.type != "cpu" or MASKED_INDEX is None:
        return lambda *index: table[index]
    # The CPU's template corrupts the names of sizes in the code that it generates, some of the time. This takes an
    # element without any mention of a size: strides are tensors, and an index that is masked is not checked.
    flat = table.flatten().contiguous()  # flattening a table of one column that is repeated leaves it a view
    strides = [torch.tensor(stride) for stride in table.contiguous().stride()]

    def element(*index: Tensor) -> Tensor:
        offset = sum(i * stride for i, stride in zip(index, strides, strict=True))
        return MASKED_INDEX(flat, index[-1] >= 0, [offset], 0)

    return element


def _block_mask(queries: Tensor, keys: Tensor, lowest: Tensor, visible: Callable[..., Tensor]) -> "BlockMask":
    """Lists the blocks of keys that each block of queries needs, and the other way round.

    Args:
        queries: `[batch or 1, queries]`, positions; -FAR: sees nothing.
        keys: `[batch or 1, keys]`, positions; FAR: hidden from all.
        lowest: `[batch or 1, queries]`, the lowest position that the query sees.
        visible: Says of a single query and key whether they see each other.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first_key, last_key = _extremes(keys, FAR)
    _, last_real_key = _extremes(keys.masked_fill(keys == FAR, -FAR), -FAR)
    first_query, last_query = (x.mT for x in _extremes(queries, -FAR))
    first_lowest, last_lowest = (x.mT for x in _extremes(lowest, FAR))
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
    """Returns lowest and highest position of each block, `[batch, 1, 1, blocks]`; `fill` completes the last one."""
    num_blocks = max(2, -(-positions.shape[1] // BLOCK))  # the compiler would take a size of 1 for a constant
    padded = F.pad(positions, (0, num_blocks * BLOCK - positions.shape[1]), value=fill)
    lowest, highest = padded.view(len(positions), 1, 1, num_blocks, BLOCK).aminmax(dim=-1)
    return lowest, highest


def _listed(blocks: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Returns how many blocks of each row are set, and which: those first, in the order asked for."""
    last = blocks.shape[-1] - 1
    order = torch.argsort(blocks.flip(-1).int() if descending else blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), (last - order if descending else order).int()


def _cut_short(mask: "BlockMask", limits: tuple[int, ...]) -> "BlockMask":
    """Returns the mask of every head, of whose whole blocks only the nearest `limits[head]` are left."""
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
