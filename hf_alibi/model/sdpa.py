"""Attention with PyTorch's fused kernels, the default backend.

Where only the future is hidden, and where a batch can be cut into causal runs, the kernels are called tile by tile
(`causal.py`) and no bias of queries times keys is stored. All other cases store the bias of one block of queries at a
time.

The kernels for GPUs need a stored bias. A bias of moderate size is stored once for all layers of a pass there.
"""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import HeldKeys
from .causal import attention_in_runs, causal_attention, in_dtype, is_one_operator, kernel, reverse_kernel
from .inputs import AttentionInputs, attention_inputs, without_autocast
from .layout import TokenLayout
from .recording import has_any_length, has_values, is_compiled, is_exported
from .tiles import QUERY_BLOCK, STORED_BIAS, stored_queries

# Devices that never store a bias for all layers: the kernels of the CPU take a view of a line, and on the meta device
# the same operations are counted as on the CPU.
WITHOUT_STORED_BIAS = ("cpu", "meta")
# The kernels for GPUs copy a bias whose rows do not begin at multiples of so many numbers.
ALIGNMENT = 8


def sdpa_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    key_norms: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention with PyTorch's fused kernels. The arguments are those of `eager_attention_forward`.

    With a windowed cache, groups of heads have different keys. Then `key` is a list of `HeldKeys`. `key_norms`,
    `[key_value_heads]`, is a bound of the norms of all keys, if the cache knows one.

    Returns:
        The output `[batch, queries, heads, head_dim]`, and `None` in place of attention weights.
    """
    layout = attention_mask
    if isinstance(key, list):
        return _windowed(query, key, layout, scaling), None
    if is_exported() or (has_any_length(query, key) and not is_one_operator(dropout, query, key, value)):
        # A recorded loop over tiles would hold for this length only.
        layout = layout._replace(length=None)
    inputs = attention_inputs(query, key, value, layout, scaling, dropout)
    device, in_tiles = query.device.type, layout.length is not None or layout.runs is not None
    # A cache that knows the norms has no empty slots, so the queries belong to the last keys.
    at_the_end = key_norms is not None and layout.mask is None and has_values(query)
    if device == "cpu" and (in_tiles or at_the_end):
        inputs = inputs.with_lossless_windows(module.config.window_tolerance, key_norms)
    with without_autocast(device):
        if _is_stored(inputs, layout):
            output = _without_unused(kernel(inputs, _stored_bias(inputs, layout)), layout)
        elif layout.length is not None:
            output = causal_attention(inputs)
        elif layout.runs is not None:
            output = attention_in_runs(inputs, layout.runs)
        elif inputs.windows is not None:
            output = _after_padding(inputs, layout, inputs.windows)
        else:
            output = _masked(inputs, layout)
    return output.transpose(1, 2).contiguous(), None


def _is_stored(inputs: AttentionInputs, layout: TokenLayout) -> bool:
    """Whether the bias is stored once for all layers. One that is trained is not: its gradient would be as large."""
    query, key = inputs.query, inputs.key
    if query.device.type in WITHOUT_STORED_BIAS or is_exported() or has_any_length(query, key):
        return False
    if torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (inputs.slopes, layout.mask)
    ):
        return False
    texts = 1 if layout.length is not None else query.shape[0]
    return texts * query.shape[1] * query.shape[2] * key.shape[2] <= STORED_BIAS


def _stored_bias(inputs: AttentionInputs, layout: TokenLayout) -> Tensor:
    """Returns bias and mask of the whole pass, `[batch or 1, heads, queries, keys]`, in the dtype of the queries."""
    bias, dtype, keys = layout.shared.bias, inputs.query.dtype, inputs.key.shape[2]
    if bias is None or bias.dtype != dtype or bias.shape[3] != keys:

        def of(rows: slice) -> Tensor:
            dense = layout.dense_bias(inputs.slopes, rows)[..., :keys]
            return F.pad(in_dtype(dense, dtype), (0, -keys % ALIGNMENT))

        # Block by block, because `dense_bias` needs several times the memory of its result.
        bias = torch.cat([of(rows) for rows in _blocks(inputs)], dim=2)[..., :keys]
        # A compiled graph computes equal values once.
        if not is_compiled():
            layout.shared.bias = bias
    return bias


def _blocks(inputs: AttentionInputs) -> list[slice]:
    """Returns blocks of queries, of each of which the bias can be stored."""
    query = inputs.query
    size = min(QUERY_BLOCK, stored_queries(query, inputs.key, query.shape[0]))
    return [slice(start, start + size) for start in range(0, query.shape[2], size)]


def _after_padding(inputs: AttentionInputs, layout: TokenLayout, windows: Tensor) -> Tensor:
    """Computes attention of the last tokens. Heads whose windows lie after all padding need no mask.

    Returns:
        `[batch, heads, queries, head_dim]`.
    """
    first = layout.clear_from()
    furthest = windows.view(inputs.key.shape[1], -1).amax(1)
    is_clear = (furthest <= inputs.key.shape[2] - inputs.query.shape[2] - first).tolist()
    outputs = []
    for needs_no_mask, group in groupby(range(len(is_clear)), key=is_clear.__getitem__):
        start, *more = group
        part = inputs.of_heads(slice(start, start + 1 + len(more)))
        outputs.append(causal_attention(part.with_keys_from(first)) if needs_no_mask else _masked(part, layout))
    return torch.cat(outputs, dim=1)


def _masked(inputs: AttentionInputs, layout: TokenLayout) -> Tensor:
    """Computes attention with a stored bias, one block of queries at a time.

    Returns:
        `[batch, heads, queries, head_dim]`. Padding whose output is unused (`TokenLayout.query_mask`) gets zeros.
    """
    if is_exported():
        # Some engines support neither shared key-value heads nor a bias of higher precision than the queries.
        exact = inputs.to(inputs.slopes.dtype).with_all_heads()
        output = kernel(exact, layout.dense_bias(inputs.slopes, slice(None))).to(inputs.query.dtype)
    elif has_any_length(inputs.query, inputs.key):
        output = kernel(inputs, layout.dense_bias(inputs.slopes, slice(None)))
    else:
        outputs = [
            kernel(inputs._replace(query=inputs.query[:, :, rows]), layout.dense_bias(inputs.slopes, rows))
            for rows in _blocks(inputs)
        ]
        output = torch.cat(outputs, dim=2)
    return _without_unused(output, layout)


def _without_unused(output: Tensor, layout: TokenLayout) -> Tensor:
    """Returns the output with zeros at padding whose output is unused."""
    if layout.query_mask is None:
        return output
    return output.masked_fill(~layout.query_mask[:, None, :, None], 0)


def _windowed(query: Tensor, held: list[HeldKeys], layout: TokenLayout, scaling: float) -> Tensor:
    """Computes attention for each group of heads with its own keys; returns `[batch, queries, heads, head_dim]`."""
    output = torch.empty_like(query.transpose(1, 2))
    with without_autocast(query.device.type):
        for group in held:
            ring = group.ring
            slopes = layout.slopes[ring.heads]
            inputs = AttentionInputs(query[:, ring.heads], group.keys, group.values, slopes, scaling)
            if not group.only_future_is_hidden(layout):
                part = _masked(inputs, group.layout(layout))
            elif group.in_order:
                part = causal_attention(inputs._replace(windows=ring.windows))
            else:
                part = reverse_kernel(inputs, ring.bias(query.shape[2], group.length))
            output[:, :, ring.heads] = part.transpose(1, 2)
    return output
