"""Context parallelism: the tokens of every row are divided among ranks, so that a long text fits into memory.

    parallel = ContextParallel(group)
    loss = model(**parallel.split(batch)).loss      # every rank has the whole batch, and computes its part of each row

Each rank computes its own tokens. Attention also needs earlier keys and values, which other ranks hold. ALiBi needs
only their distances, so the ranks exchange keys and values and nothing else. A head with a lossless window
(`model/windows.py`) gets only the keys inside its window, and no rank gets keys of documents that its tokens do not
see. The exchange is one `all_to_all` per layer and direction.

Every rank knows which keys each rank needs: the largest norms of queries and keys, from which the windows follow, are
shared first. A key that was not sent is zero. Its score is then 0, which the bound of the window allows too, so it
weighs less than rounding.

Parts are contiguous, or balanced: then rank r of n has parts r and 2n - 1 - r of 2n, and all ranks have equally many
pairs of queries and keys ("zigzag"; Brandon et al., arXiv 2311.09431, with two parts per rank as in Llama 3, arXiv
2407.21783, section 3.3.2).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..model.documents import Packing
from ..model.layout import Shared, TokenLayout, token_layout
from ..model.runs import ranges
from ..model.windows import UNLIMITED, head_windows

IGNORED_LABEL = -100
# Arguments of a batch that have one entry for each token.
PER_TOKEN = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids")


class ContextParallel:
    """Divides the rows of batches among the ranks of a group.

    Args:
        group: The ranks, `None` for all. All of them must get the same batches.
        balanced: Whether each rank gets an early and a late part of a row, so that all do equally much work.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, balanced: bool = True) -> None:
        self.group, self.balanced = group, balanced

    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this rank's part of a batch, as arguments for the model.

        The labels are shifted before the rows are divided. The loss is divided by the number of labels in the whole
        batch, so that the mean of the ranks' losses, and of their gradients, is that of one process.

        Args:
            batch: Arguments for a language model: `input_ids` or `inputs_embeds`, and any of `labels`,
                `shift_labels`, `num_items_in_batch`, `position_ids`, an `attention_mask` of `[batch, tokens]`, and the
                arguments that describe documents.

        Raises:
            ValueError: If an argument cannot be divided.
        """
        part = dict(batch)
        tokens = part["input_ids"] if part.get("inputs_embeds") is None else part["inputs_embeds"]
        mask = part.pop("attention_mask", None)
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"Context parallelism cannot divide an attention_mask of shape {tuple(mask.shape)}; give one of "
                "[batch, tokens], or position_ids."
            )
        packing = Packing.taken_from(part)
        layout = token_layout(torch.empty(0), tokens, mask, part.get("position_ids"), None, packing)
        shard = ContextShard(layout, tuple(tokens.shape[:2]), self.group, self.balanced)
        if part.get("labels") is not None:
            if part.get("shift_labels") is None:
                part["shift_labels"] = F.pad(part["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
            if part.get("num_items_in_batch") is None:
                scored = (part["shift_labels"] != IGNORED_LABEL).sum()
                part["num_items_in_batch"] = scored / dist.get_world_size(self.group)
        for name in PER_TOKEN:
            if part.get(name) is not None:
                part[name] = part[name][:, shard.own_index.to(part[name].device)].contiguous()
        if not shard.is_divided and shard.rank > 0 and part.get("labels") is not None:
            part["shift_labels"] = torch.full_like(part["shift_labels"], IGNORED_LABEL)
        return part | {"use_cache": False, "context_shard": shard}


class ContextShard:
    """One rank's part of the rows of a batch. The model takes it as the argument `context_shard`.

    Args:
        layout: The layout of the whole rows, without slopes.
        shape: Number of rows and of tokens in each row.
        group: The ranks among which the rows are divided.
        balanced: See `ContextParallel`.

    Attributes:
        own_index: `[tokens]`, the indices of this rank's tokens in the row.
        is_divided: False for rows with fewer tokens than parts. Every rank then has the whole rows, and the first rank
            alone scores them.
        bytes_by_head: Bytes that this rank has received in the forward pass, by key-value head.
    """

    def __init__(
        self, layout: TokenLayout, shape: tuple[int, int], group: dist.ProcessGroup | None, balanced: bool
    ) -> None:
        self.layout, self.group = layout, group
        self.batch, length = shape
        self.rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        count = 2 * ranks if balanced else ranks
        self.is_divided = length >= count
        parts = [range(*ends) for ends in pairwise(length * i // count for i in range(count + 1))]
        of_ranks = [[parts[r], parts[-1 - r]] if balanced else [parts[r]] for r in range(ranks)]
        # A single rank, and the middle of an odd number, have neighbouring parts.
        self.parts = [_joined(own) for own in of_ranks] if self.is_divided else [[range(length)]] * ranks
        self.own_index = torch.cat([torch.arange(part.start, part.stop) for part in self.parts[self.rank]])
        self.bytes_by_head: list[int] = []
        # Positions count tokens. Indices may differ from them where there is padding.
        is_plain = layout.key_mask is None or bool(layout.key_mask.all())
        self.lows = {
            part.start: 0 if layout.first is None or not is_plain else int(layout.first[:, part.start].min())
            for own in self.parts
            for part in own
            if len(part)
        }
        self.is_plain = is_plain

    def whole_layout(self, slopes: Tensor) -> TokenLayout:
        """Returns the layout of the whole rows."""
        return self.layout._replace(slopes=slopes)

    def own_layout(self, layout: TokenLayout) -> TokenLayout:
        """Returns the layout of this rank's queries, with the keys up to the last of them."""
        if not self.is_divided:
            return layout
        mine, end = self.own_index.to(layout.keys.device), self.parts[self.rank][-1].stop
        part = layout._replace(
            queries=layout.queries[:, mine],
            keys=layout.keys[:, :end],
            first=None if layout.first is None else layout.first[:, mine],
            query_mask=None if layout.query_mask is None else layout.query_mask[:, mine],
            key_mask=None if layout.key_mask is None else layout.key_mask[:, :end],
            shared=Shared(),
            length=None,
            runs=None,
            exchange=self.exchange,
        )
        if layout.length is not None and len(self.parts[self.rank]) == 1:
            return part._replace(length=end)
        return part._replace(runs=part.all_runs(self.batch))

    def exchange(
        self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scaling: float, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that this rank's queries need, with zeros for those that no query needs.

        Args:
            query: `[batch, heads, tokens, head_dim]`, of this rank.
            key: `[batch, key_value_heads, tokens, head_dim]`, of this rank.
            value: `[batch, key_value_heads, tokens, head_dim]`, of this rank.
            slopes: `[heads]`, or another bias as in `TokenLayout.slopes`.
            scaling: Factor of the scores before the bias is added.
            tolerance: Fraction of a head's attention that may be lost.

        Returns:
            Keys and values `[batch, key_value_heads, keys, head_dim]`, from the start of the row.
        """
        reach = [UNLIMITED] * key.shape[1]
        # Only a linear bias gives windows.
        if tolerance and self.is_plain and slopes.dim() == 1:
            bounds = self._score_bounds(query, key) * scaling
            reach = head_windows(slopes, bounds, tolerance).view(key.shape[1], -1).amax(1).tolist()
        plan = make_plan(self.parts, self.rank, self.lows, reach, key.device)
        row_bytes = self.batch * (key.shape[3] + value.shape[3]) * key.element_size()
        before = self.bytes_by_head or [0] * len(reach)
        self.bytes_by_head = [a + b * row_bytes for a, b in zip(before, plan.tokens_by_head, strict=True)]
        # Autocast may give keys and values different dtypes.
        dtype = torch.promote_types(key.dtype, value.dtype)
        states = torch.cat([key.to(dtype), value.to(dtype)], -1)
        states = _Exchange.apply(states, plan, self.parts[self.rank][-1].stop, self.group)
        return states.split([key.shape[3], value.shape[3]], dim=-1)

    def _score_bounds(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the largest norm of the queries times that of the keys, of all ranks, `[heads]`."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        largest = [torch.linalg.vector_norm(x.detach(), dim=-1, dtype=dtype).amax((0, 2)) for x in (query, key)]
        norms = torch.stack([largest[0], largest[1].repeat_interleave(query.shape[1] // key.shape[1])])
        dist.all_reduce(norms, op=dist.ReduceOp.MAX, group=self.group)
        return norms[0] * norms[1] * (1 + 1e-6)


class Plan(NamedTuple):
    """Which keys this rank sends and receives. A row is one token of one key-value head.

    Attributes:
        own: `[own rows]`, where this rank's rows are among all rows that it needs.
        sent: `[sent rows]`, which of its own rows this rank sends, in the order of ranks.
        sent_sizes: Number of rows for each rank.
        received: `[received rows]`, where the received rows are among all rows that this rank needs.
        received_sizes: Number of rows from each rank.
        tokens_by_head: Number of tokens that this rank receives, by key-value head.
    """

    own: Tensor
    sent: Tensor
    sent_sizes: list[int]
    received: Tensor
    received_sizes: list[int]
    tokens_by_head: list[int]


def make_plan(
    parts: list[list[range]], rank: int, lows: Mapping[int, int], reach: list[int], device: torch.device
) -> Plan:
    """Returns the plan of an exchange, in which all ranks agree.

    Args:
        parts: The parts of a row that each rank has, in ascending order.
        rank: This rank.
        lows: The first key that the queries of a part see, by the start of the part.
        reach: The distance that each key-value head sees.
        device: Where to put the indices.
    """
    ranks, heads = range(len(parts)), range(len(reach))

    def moved(source: int, target: int, head: int) -> list[range]:
        """Returns which tokens of `source` the rank `target` needs."""
        needed = _joined(
            [range(max(part.start - reach[head], lows[part.start]), part.start) for part in parts[target]]
        )
        return [common for a in needed for b in parts[source] if (common := _common(a, b))] if source != target else []

    total, end = sum(map(len, parts[rank])), parts[rank][-1].stop
    before, offsets = 0, {}
    for part in parts[rank]:
        offsets[part] = before - part.start
        before += len(part)
    sent = [
        [range(r.start + head * total + offset, r.stop + head * total + offset)
         for head in heads for r in moved(rank, other, head)
         for part, offset in offsets.items() if r.start in part]
        for other in ranks
    ]  # fmt: skip
    received = [
        [range(r.start + head * end, r.stop + head * end) for head in heads for r in moved(other, rank, head)]
        for other in ranks
    ]
    own = [range(part.start + head * end, part.stop + head * end) for head in heads for part in parts[rank]]
    return Plan(
        _index(own, device),
        _index([r for rows in sent for r in rows], device),
        [sum(map(len, rows)) for rows in sent],
        _index([r for rows in received for r in rows], device),
        [sum(map(len, rows)) for rows in received],
        [sum(len(r) for other in ranks for r in moved(other, rank, head)) for head in heads],
    )


def _joined(parts: list[range]) -> list[range]:
    """Returns ascending ranges that do not touch, with the same numbers."""
    result: list[range] = []
    for part in sorted(filter(len, parts), key=lambda part: part.start):
        if result and part.start <= result[-1].stop:
            result[-1] = range(result[-1].start, max(part.stop, result[-1].stop))
        else:
            result.append(part)
    return result


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _index(rows: list[range], device: torch.device) -> Tensor:
    starts, sizes = torch.tensor([r.start for r in rows]), torch.tensor([len(r) for r in rows])
    return ranges(starts.long(), sizes.long()).to(device)


class _Exchange(torch.autograd.Function):
    """Sends rows to the ranks that need them; in the backward pass, sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, plan: Plan, keys: int, group: Any) -> Tensor:
        """Maps the states of this rank `[batch, heads, tokens, size]` to `[batch, heads, keys, size]`."""
        ctx.plan, ctx.group, ctx.shape = plan, group, states.shape
        rows = states.permute(1, 2, 0, 3).flatten(0, 1)  # [heads * tokens, batch, size]
        received = _to_ranks(rows[plan.sent], plan.sent_sizes, plan.received_sizes, group)
        result = rows.new_zeros(states.shape[1] * keys, *rows.shape[1:])
        result[plan.own], result[plan.received] = rows, received
        return result.unflatten(0, (states.shape[1], keys)).permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Returns the gradient of this rank's states, with the parts from all ranks."""
        plan = ctx.plan
        rows = grad.permute(1, 2, 0, 3).flatten(0, 1)
        returned = _to_ranks(rows[plan.received], plan.received_sizes, plan.sent_sizes, ctx.group)
        # Several ranks may return gradients of one key. In 16 bits, their sum would be rounded each time.
        total = rows[plan.own].to(torch.promote_types(rows.dtype, torch.float32))
        total.index_add_(0, plan.sent, returned.to(total.dtype))
        return total.to(grad.dtype).unflatten(0, tuple(ctx.shape[1:3])).permute(2, 0, 1, 3), None, None, None


def _to_ranks(rows: Tensor, sizes: list[int], received_sizes: list[int], group: Any) -> Tensor:
    """Sends the next `sizes[r]` rows to each rank r, and returns what they send here."""
    received = rows.new_empty(sum(received_sizes), *rows.shape[1:])
    # As bytes, because not every backend can send every dtype.
    into, sent = (states.contiguous().view(torch.uint8) for states in (received, rows))
    dist.all_to_all_single(into, sent, received_sizes, sizes, group=group)
    return received
