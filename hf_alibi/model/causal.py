"""Causal ALiBi attention tile by tile: exact, in linear memory, without the keys beyond a head's window.

PyTorch's fused kernels have no windows, no bias by offset and no offset into a cache. Calling them tile by tile
(`tiles.py`) provides all three, in the forward and the backward pass.

On the CPU all tiles together are one custom operator, which autograd and compilers treat as a single node. It sums
gradients in place; autograd would keep a padded copy of all key gradients for every tile. A compiled model needs one
graph for all lengths.

The operator has a first derivative in reverse mode only. Forward-mode AD (`torch.func.jvp`, `jacfwd`,
`torch.autograd.forward_ad`) and all transforms of `torch.func` (`grad`, `vmap`, `jacrev`, `hessian`, also nested) use
PyTorch's plain attention for each tile instead. It is exact and has every derivative. A second backward pass
(`create_graph=True`) cannot be detected in advance, so it raises an error.
"""

import re
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from .alibi import causal_line
from .distance_gradient import backward_by_distance
from .flops import register_flops
from .inputs import AttentionInputs
from .private_torch import CPU_FLASH, CPU_FLASH_BACKWARD, TRANSFORMS_ARE_ACTIVE, has_own_operator
from .recording import has_values, is_compiled
from .runs import Runs
from .tiles import FULL_SPEED, NEAR_BLOCK, Tile, in_pieces, joined, key_tiles, query_tiles, stored_queries

# Keys per group in the gradient of the slopes, in which distances are measured from the start of a group. Smaller
# groups keep these distances small, hence rounding low, but add more columns to every matrix product.
SLOPE_GRAIN = 64
# Derived from the module name, because the copy of this file in a checkpoint registers operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__)


def causal_attention(inputs: AttentionInputs) -> Tensor:
    """Computes causal attention for queries that belong to the last keys, without padding.

    Returns:
        `[batch, heads, queries, head_dim]`.
    """
    query, slopes = inputs.query, inputs.slopes
    if is_one_operator(inputs.dropout, query, inputs.key, inputs.value, slopes):
        is_short = query.shape[2] <= min(NEAR_BLOCK, inputs.key.shape[2] - 1)
        if is_short and has_values(query) and not torch.is_grad_enabled():
            return _one_block(inputs)
        dtype = query.dtype
        # float16 kernels are slower than float32 ones, several times so in the backward pass. The gradient of the
        # slopes is a sum of large terms that cancel, which needs more precision than 16 bits.
        if slopes.requires_grad or dtype == torch.float16:
            inputs = inputs.to(slopes.dtype)
        output, _ = attention_in_tiles(inputs.query, inputs.key, inputs.value, slopes, inputs.windows, inputs.scaling)
        return output.to(dtype)
    outputs = []
    line = _line(query, inputs.key, slopes)
    # Without windows every head sees the same keys, so a tile contains all heads.
    for tile in query_tiles(query, inputs.key, None, stored_queries(query, inputs.key)):
        states = tile.of_queries(query), tile.of_keys(inputs.key), tile.of_keys(inputs.value)
        bias = tile.bias(line, _corner(tile, query.shape[2]))
        outputs.append(reverse_kernel(inputs.with_states(*states), bias))
    return torch.cat(outputs, dim=2)


def _one_block(inputs: AttentionInputs) -> Tensor:
    """Computes causal attention of a few queries with a cache, without the cost of a call of the custom operator.

    Returns:
        `[batch, heads, queries, head_dim]`.
    """
    tiles = list(query_tiles(inputs.query, inputs.key, inputs.windows))
    # The line covers only keys that a tile looks at.
    first = min(tile.keys.start for tile in tiles)
    line = _line(inputs.query, inputs.key[:, :, first:], inputs.slopes)
    outputs = []
    for tile in tiles:
        states = tile.of_queries(inputs.query), tile.of_keys(inputs.key), tile.of_keys(inputs.value)
        bias = tile.bias(line, _corner(tile, inputs.query.shape[2]) - first)
        outputs.append(reverse_kernel(inputs.with_states(*states), bias))
    return torch.cat(outputs, dim=1)


def is_one_operator(dropout: float, query: Tensor, *others: Tensor) -> bool:
    """Whether `causal_attention` uses the custom operator for these tensors, not a loop of kernel calls."""
    return query.device.type == "cpu" and not dropout and has_own_operator() and not is_transformed(query, *others)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of `torch.func` or forward-mode AD needs derivatives that the custom operator lacks."""
    if TRANSFORMS_ARE_ACTIVE is not None and TRANSFORMS_ARE_ACTIVE():
        return True
    # While compiling there is nothing to check: a graph is traced again under forward-mode AD, and PyTorch raises an
    # error for operators that it cannot differentiate.
    return not is_compiled() and any(unpack_dual(states).tangent is not None for states in tensors)


def attention_in_runs(inputs: AttentionInputs, runs: Runs) -> Tensor:
    """Computes causal attention separately for every run of tokens.

    Args:
        inputs: The whole batch.
        runs: Which queries and keys belong together.

    Returns:
        `[batch, heads, queries, head_dim]`, with zeros for queries in no run.
    """
    batch, heads, num_queries, head_dim = inputs.query.shape
    query = _flat(inputs.query, runs.queries)
    key, value = _flat(inputs.key, runs.keys), _flat(inputs.value, runs.keys)
    sizes = runs.query_sizes, runs.key_sizes, runs.key_sizes
    pieces = (states.split(size, dim=2) for states, size in zip((query, key, value), sizes, strict=True))
    outputs = [causal_attention(inputs.with_states(*run)) for run in zip(*pieces, strict=True)]
    output = torch.cat(outputs, dim=2) if outputs else query
    if runs.queries is not None:
        padded = query.new_zeros(1, heads, batch * num_queries, head_dim)
        output = padded.index_copy(2, runs.queries, output)
    return output.unflatten(2, (batch, num_queries))[0].transpose(0, 1)


def _flat(states: Tensor, index: Tensor | None) -> Tensor:
    """Concatenates the rows of a batch and returns the tokens at `index`, `[1, heads, tokens, head_dim]`."""
    flat = states.transpose(1, 2).flatten(0, 1)  # [batch * tokens, heads, head_dim]
    return (flat if index is None else flat.index_select(0, index)).transpose(0, 1)[None]


def reverse_kernel(inputs: AttentionInputs, bias: Tensor) -> Tensor:
    """Computes `kernel` with a bias whose rows are in the reverse order of the queries, as `bias_view` makes it."""
    if inputs.query.device.type != "cpu":
        # Only the CPU kernels accept a bias with overlapping strides.
        bias = bias.to(inputs.query.dtype, copy=True, memory_format=torch.contiguous_format)
    if inputs.query.shape[2] == 1:
        return kernel(inputs, bias)
    return kernel(inputs._replace(query=inputs.query.flip(2)), bias).flip(2)


def kernel(inputs: AttentionInputs, bias: Tensor) -> Tensor:
    """Computes PyTorch's attention with a bias.

    Args:
        inputs: `inputs.slopes` and `inputs.windows` are not used.
        bias: `[batch or 1, heads, queries, keys]`. On the CPU it keeps a higher precision than the queries.

    Returns:
        `[batch, heads, queries, head_dim]`.
    """
    query, key, value, dtype = inputs.query, inputs.key, inputs.value, inputs.query.dtype
    if query.device.type != "cpu" and bias.dtype != dtype:
        # Only the CPU kernels accept a bias in another dtype.
        bias = in_dtype(bias, dtype)
    backend: Any = nullcontext()
    if is_transformed(query, key, value, bias):
        query, key, value = (states.to(bias.dtype) for states in (query, key, value))
        backend = sdpa_kernel(SDPBackend.MATH)
    with backend:
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias.expand(query.shape[0], -1, -1, -1),
            dropout_p=inputs.dropout,
            scale=inputs.scaling,
            # The comparison works on symbolic sizes while a graph is compiled; `bool()` would need their values.
            enable_gqa=True if query.shape[1] != key.shape[1] else False,  # noqa: SIM210
        )
    return output.to(dtype)


def in_dtype(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a bias in another dtype. The lowest value stays finite: that of one dtype is infinite in another."""
    return bias.clamp(min=torch.finfo(dtype).min).to(dtype)


def _line(query: Tensor, key: Tensor, slopes: Tensor) -> Tensor:
    """Returns the bias by offset, `[heads, offsets]`, for all offsets that occur in a tile."""
    return causal_line(slopes, behind=key.shape[2] - 1, ahead=min(FULL_SPEED, query.shape[2]) - 1)


def _corner(tile: Tile, num_queries: int) -> int:
    """Returns the index into the line at which the tile's last query meets its first key."""
    return num_queries - tile.queries.stop + tile.keys.start


def _with_dense_rows(states: Tensor) -> Tensor:
    """Returns states with stride 1 in the last dimension, which the kernels below assume without a check."""
    return states if states.stride(-1) == 1 else states.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::attention_in_tiles", mutates_args=())
def attention_in_tiles(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, windows: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Computes causal attention tile by tile with the CPU's flash kernel.

    Returns:
        The output `[batch, heads, queries, head_dim]`, and `[batch, heads, queries]`, the logarithm of the sum of
        exponentials in each softmax.
    """
    query, key, value = (_with_dense_rows(states) for states in (query, key, value))
    batch, _, num_queries, _ = query.shape
    line = _line(query, key, slopes)
    output, logsumexp = _empty_results(query, slopes)
    for tile in joined(query_tiles(query, key, windows)):
        results = CPU_FLASH(
            tile.of_queries(query).flip(2),
            tile.of_keys(key),
            tile.of_keys(value),
            attn_mask=tile.bias(line, _corner(tile, num_queries)).expand(batch, -1, -1, -1),
            scale=scaling,
        )
        for into, result in zip((output, logsumexp), results, strict=True):
            tile.of_queries(into).copy_(result.flip(2))
        # Frees the memory before the next tile needs as much again.
        del results, result
    return output, logsumexp


def _empty_results(query: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, head_dim = query.shape
    output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    return output, slopes.new_empty(batch, heads, num_queries)


@attention_in_tiles.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(query, slopes)


@torch.library.custom_op(f"{NAMESPACE}::attention_in_tiles_backward", mutates_args=())
def attention_in_tiles_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    windows: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    scaling: float,
    of_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value and slopes.

    Args:
        grad_output: `[batch, heads, queries, head_dim]`.
        query: As in the forward pass, like the next five arguments.
        key: See `query`.
        value: See `query`.
        slopes: See `query`. Of `[heads, distances]`, every number has a gradient.
        windows: See `query`.
        output: The first result of the forward pass.
        logsumexp: The second result of the forward pass.
        scaling: As in the forward pass.
        of_slopes: Whether to compute the gradient of the slopes. It is 0 otherwise.
    """
    grad_output, query, key, value = (_with_dense_rows(states) for states in (grad_output, query, key, value))
    if of_slopes and slopes.dim() == 2:
        line = _line(query, key, slopes)
        grads = backward_by_distance(grad_output, query, key, value, line, output, logsumexp, scaling)
        return *grads[:3], F.pad(grads[3], (0, slopes.shape[1] - key.shape[2]))
    reverse = _line(query, key, slopes).flip(1)
    # Tiles add to the gradients of queries, so these are summed in high precision. Each key is in one tile only.
    grad_query = torch.zeros_like(query, dtype=slopes.dtype)
    grad_key, grad_value, grad_slopes = torch.zeros_like(key), torch.zeros_like(value), torch.zeros_like(slopes)
    head_dim = query.shape[3]
    for tile in map(in_pieces, joined(key_tiles(query, key, windows))):
        corner = reverse.shape[1] - query.shape[2] + tile.queries.start - tile.keys.stop + 1
        tensors = (
            tile.of_queries(grad_output),
            tile.of_queries(query),
            tile.of_keys(key).flip(2),
            tile.of_keys(value).flip(2),
            tile.of_queries(output),
        )
        dq, dk, dv = CPU_FLASH_BACKWARD(
            *(_with_slope_columns(*tensors) if of_slopes else tensors),
            tile.of_queries(logsumexp),
            0.0,
            False,
            attn_mask=tile.bias(reverse, corner).expand(len(query), -1, -1, -1),
            scale=scaling,
        )
        if of_slopes:
            past = key.shape[2] - query.shape[2]
            grad_slopes[tile.heads] += _slopes_of_tile(tile, past, dq[..., head_dim:] / scaling)
        tile.add_queries(grad_query, dq[..., :head_dim])
        tile.put_keys(grad_key, dk[..., :head_dim].flip(2))
        tile.put_keys(grad_value, dv[..., :head_dim].flip(2))
        # Frees the memory before the next tile needs as much again.
        del dq, dk, dv
    return grad_query.to(query.dtype), grad_key, grad_value, grad_slopes


def _with_slope_columns(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor
) -> tuple[Tensor, ...]:
    """Returns the tensors with additional columns, from whose query gradients the gradient of the slopes follows.

    The bias m (j - i) has the derivative j - i with respect to m. So the gradient of m is the sum, over queries and
    keys, of j - i times the gradient of the score. The kernel computes such sums for every column of the queries: the
    sum over keys of that column of the key times the gradient of the score.

    The additional columns are 0 in the queries, so no score changes. Keys are divided into groups of `SLOPE_GRAIN`. In
    the keys, the first column is the distance to the first key of the group, and the others are 1 for the own group
    and 0 otherwise. `_slopes_of_tile` combines these sums into j - i. The full distance in one column would be less
    precise: large distances cancel in the sum, but their rounding errors do not.
    """
    offsets = torch.arange(key.shape[2] - 1, -1, -1)
    columns = torch.cat([offsets[:, None] % SLOPE_GRAIN, F.one_hot(offsets // SLOPE_GRAIN)], -1).to(key.dtype)
    key = torch.cat([key, columns.expand(*key.shape[:2], -1, -1)], -1)
    room = (0, columns.shape[1])
    grad_output, query, value, output = (F.pad(states, room) for states in (grad_output, query, value, output))
    return grad_output, query, key, value, output


def _slopes_of_tile(tile: Tile, past: int, columns: Tensor) -> Tensor:
    """Returns the gradient of the slopes of a tile's heads, `[heads]`.

    Args:
        tile: The tile.
        past: Number of keys before the first query.
        columns: `[batch, heads or blocks, num_queries, 1 + groups]`, the gradients of the query columns that
            `_with_slope_columns` adds.
    """
    blocks = torch.arange(tile.blocks)[:, None, None] * (tile.key_step - tile.query_step)
    queries = torch.arange(tile.num_queries)[:, None] + tile.queries.start + past
    grains = torch.arange(columns.shape[3] - 1) * SLOPE_GRAIN + tile.keys.start
    sums = columns[..., 0] + ((grains - queries + blocks) * columns[..., 1:]).sum(-1)
    return sums.sum((0, 1, 2))[None] if tile.is_of_one_head else sums.sum((0, 2))


@attention_in_tiles_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (torch.empty_like(_with_dense_rows(states)) for states in (query, key, value))
    return query, key, value, torch.empty_like(slopes)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_slopes = ctx.needs_input_grad[3]
    *grads, grad_slopes = attention_in_tiles_backward(grad_output, *ctx.saved_tensors, ctx.scaling, of_slopes)
    return *grads, grad_slopes if of_slopes else None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "sdpa has no second derivative on the CPU. To differentiate twice, use torch.func.grad, or call "
        "model.set_attn_implementation('eager')."
    )


attention_in_tiles.register_autograd(_backward, setup_context=_save_for_backward)
attention_in_tiles_backward.register_autograd(_no_second_derivative)
register_flops(
    getattr(torch.ops, NAMESPACE).attention_in_tiles,
    getattr(torch.ops, NAMESPACE).attention_in_tiles_backward,
    slope_columns=lambda num_keys: 1 + -(-num_keys // SLOPE_GRAIN),
)
