"""Where the tokens of one forward pass stand: which keys each query sees, and how far away they are.

ALiBi needs only distances, and a distance is the number of visible tokens between two tokens. Padding
does not count, on whatever side it is. `position_ids` that restart at 0 start a new document: a query at
position p sees exactly the p tokens before it, which holds with and without a cache. A mask that the
caller made, with a value for every query and key, decides alone who sees whom, and `position_ids` then
decide the distances.

`token_layout` is called once per forward pass; every attention implementation works from its result.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .alibi import alibi_bias


class TokenLayout(NamedTuple):
    """Positions and visibility of the queries and keys of a forward pass.

    Attributes:
        slopes: `[heads]`, the slopes of all query heads.
        queries: `[batch or 1, queries]`, positions.
        keys: `[batch or 1, keys]`, positions.
        shared: Where attention implementations keep what they work out once for all layers of the pass.
        first: `[batch, queries]`, the position where the query's document starts; `None`: at the beginning.
        key_mask: `[batch, keys]`, False at padding; `None`: no padding.
        query_mask: `[batch, queries]`, the same of the queries.
        mask: `[batch or 1, heads or 1, queries, keys]`, the caller's own: boolean, True for visible, or
            added to the scores. It replaces `first`, `key_mask` and causality.
        length: Tokens in the cache and in this pass together, if nothing but the future is hidden: the
            queries are then the last of the first `length` keys. `None`: more is hidden.
        segments: Runs `(start, end)` of the flattened batch `[batch * queries]`, each of which attends
            causally within itself and nowhere else; `None`: no such runs. Tokens outside are padding.
        requests: Of each request of continuous batching the queries, which are the last of its keys, and the keys;
            `None`: no continuous batching. `mask` says the same.
    """

    slopes: Tensor
    queries: Tensor
    keys: Tensor
    shared: dict[Any, Any]
    first: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    mask: Tensor | None = None
    length: int | None = None
    segments: list[tuple[int, int]] | None = None
    requests: list[tuple[slice, slice]] | None = None

    def visible(self, rows: slice = slice(None)) -> Tensor:
        """Returns which keys the queries in `rows` see, `[batch or 1, 1, rows, keys]`, without `mask`."""
        queries, keys = self.queries[:, None, rows, None], self.keys[:, None, None, :]
        visible = keys <= queries
        if self.first is not None:
            visible = visible & (keys >= self.first[:, None, rows, None])
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, None, :]
        return visible

    def text_length(self) -> Tensor:
        """Returns the length of the longest text in the batch, in tokens, as a tensor without dimensions.

        Cached tokens count, padding does not, and each packed document is a text of its own. Under a mask of the
        caller's, a text is as long as its positions say.
        """
        first = 0 if self.first is None else self.first.clamp(min=0)
        return (self.queries - first).max() + 1

    def clear_from(self) -> int:
        """Returns the position from which on nothing but the future is hidden; worked out once for all layers."""
        if "clear_from" not in self.shared:
            hidden = torch.zeros_like(self.keys, dtype=torch.bool) if self.key_mask is None else ~self.key_mask
            if self.first is not None:
                hidden = hidden | (self.keys < self.first.amax(1, keepdim=True))
            ends = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
            self.shared["clear_from"] = int((hidden * ends).max())
        return self.shared["clear_from"]

    def dense_bias(self, slopes: Tensor, rows: slice = slice(None)) -> Tensor:
        """Returns bias and mask in one tensor, to be added to the scores of the queries in `rows`.

        Hidden keys get the lowest finite value, not -inf, so that a row without any visible key gives
        finite weights.

        Args:
            slopes: `[heads]`, slopes of the heads at hand.
            rows: Which queries.

        Returns:
            `[batch or 1, heads, rows, keys]`.
        """
        bias = alibi_bias(slopes, self.queries[:, rows], self.keys)
        lowest = torch.finfo(bias.dtype).min
        if self.mask is None:
            return bias.masked_fill(~self.visible(rows), lowest)
        mask = self.mask[:, :, rows]
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, lowest)
        return bias + mask.to(bias.dtype).clamp(min=lowest)


def token_layout(
    slopes: Tensor,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> TokenLayout:
    """Lays out the tokens of one forward pass.

    Args:
        slopes: `[heads]`, the slopes of all query heads.
        inputs_embeds: `[batch, queries, hidden_size]`, for its sizes and device.
        attention_mask: `[batch or 1, tokens]`, nonzero for real tokens, cached ones included, or a mask with
            four dimensions as in `TokenLayout.mask`.
        position_ids: `[batch or 1, queries]`.
        past_key_values: The cache, before it gets the keys of this pass.

    Raises:
        ValueError: If the mask does not cover the cached and the new tokens, or is of no known kind.
    """
    batch, num_queries = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past, num_keys = 0, num_queries
    if past_key_values is not None:
        past = past_key_values.get_seq_length()
        num_keys, _ = past_key_values.get_mask_sizes(num_queries, 0)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if isinstance(past, Tensor) and not tracing:
        past = int(past)
    slots = (torch.arange(num_queries, device=device) + past)[None]
    keys = torch.arange(num_keys, device=device)[None]

    if attention_mask is not None and attention_mask.dim() == 4:
        return _custom_layout(slopes, slots, keys, attention_mask, position_ids)
    if attention_mask is None and position_ids is None:
        unknown = isinstance(past, Tensor) or torch.compiler.is_exporting()
        length = None if unknown else past + num_queries
        return TokenLayout(slopes, slots, keys, {}, length=length)

    queries, key_mask, query_mask, first = slots, None, None, None
    if attention_mask is not None:
        slots = slots.expand(batch, -1)
        key_mask = _cover(attention_mask.to(device=device, dtype=torch.bool), batch, past, num_queries, num_keys)
        keys = key_mask.long().cumsum(-1) - 1  # some engines that models are exported to would sum booleans in 8 bits
        queries, query_mask = keys.gather(1, slots), key_mask.gather(1, slots)
    if position_ids is not None:
        first = (queries - position_ids.to(device)).expand(batch, -1)
    layout = TokenLayout(slopes, queries, keys, {}, first, key_mask, query_mask)
    if tracing:
        return layout
    return _simplified(layout, past, past + num_queries)


def _custom_layout(
    slopes: Tensor, slots: Tensor, keys: Tensor, mask: Tensor, position_ids: Tensor | None
) -> TokenLayout:
    if mask.shape[-2:] != (slots.shape[1], keys.shape[1]):
        raise ValueError(
            f"The attention mask has shape {tuple(mask.shape)}; with four dimensions the last two must be the "
            f"{slots.shape[1]} queries and {keys.shape[1]} keys of this pass."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"An attention mask with four dimensions must be boolean or float, not {mask.dtype}.")
    if position_ids is not None:
        queries = position_ids.to(slots.device)
        keys = keys.repeat(queries.shape[0], 1).index_copy_(1, slots[0], queries)
        return TokenLayout(slopes, queries, keys, {}, mask=mask)
    return TokenLayout(slopes, slots, keys, {}, mask=mask)


def _cover(mask: Tensor, batch: int, past: int | Tensor, num_queries: int, num_keys: int) -> Tensor:
    if mask.dim() != 2 or mask.shape[0] not in (batch, 1):
        raise ValueError(
            f"The attention mask has shape {tuple(mask.shape)}; it must be [{batch}, tokens], or have four "
            "dimensions: [batch, 1 or heads, queries, keys]."
        )
    if isinstance(past, int) and mask.shape[-1] < past + num_queries:
        raise ValueError(
            f"The attention mask covers {mask.shape[-1]} tokens; it must cover the {past} cached and the "
            f"{num_queries} new ones."
        )
    return torch.nn.functional.pad(mask, (0, max(0, num_keys - mask.shape[-1])))[:, :num_keys].expand(batch, -1)


def _simplified(layout: TokenLayout, past: int, length: int) -> TokenLayout:
    """Finds out whether only the future is hidden, or else whether the batch splits into causal runs."""
    key_mask, first = layout.key_mask, layout.first
    no_padding = key_mask is None or bool(key_mask[:, :length].all())
    one_document = first is None or bool((first <= 0).all())
    if no_padding and one_document:
        return layout._replace(length=length)
    if past > 0:
        return layout
    return layout._replace(segments=_segments(layout, length))


def _segments(layout: TokenLayout, length: int) -> list[tuple[int, int]] | None:
    """Splits a batch without cached tokens into runs `(start, end)`, or returns `None` if it does not split."""
    like = layout.first if layout.first is not None else layout.key_mask
    assert like is not None
    batch = like.shape[0]
    position = layout.queries.expand(batch, -1)
    real = torch.ones_like(position, dtype=torch.bool) if layout.key_mask is None else layout.key_mask[:, :length]
    first = torch.zeros_like(position) if layout.first is None else layout.first.clamp(min=0)

    slot = torch.arange(length, device=position.device)
    sees_previous = torch.zeros_like(real)
    sees_previous[:, 1:] = real[:, :-1] & (first[:, 1:] < position[:, 1:])
    starts = real & ~sees_previous
    start_slot = torch.where(starts, slot, 0).cummax(-1).values
    if bool((real & (position - first != slot - start_slot)).any()):
        return None

    ends = real.clone()
    ends[:, :-1] &= ~real[:, 1:] | starts[:, 1:]
    bounds = [flags.flatten().nonzero()[:, 0].tolist() for flags in (starts, ends)]
    return [(start, end + 1) for start, end in zip(*bounds, strict=True)]
