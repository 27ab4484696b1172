"""The layout of one forward pass: which keys each query sees, and at which distances.

A query sees the tokens of its own document up to itself. Distances are differences of positions, which count tokens
and skip padding on either side. `documents.py` converts every description of documents into one tensor, `first`. A
four-dimensional mask of the caller replaces these rules: it alone decides which keys a query sees, and `position_ids`
decide the distances.

`token_layout` is called once per forward pass. Every attention backend works from its result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .alibi import alibi_bias
from .documents import Packing, Pass, check_one_document, document_starts
from .recording import has_values, is_exported
from .runs import Runs, find_runs
from .tiles import QUERY_BLOCK


@dataclass
class Shared:
    """Results that attention backends compute once, when first needed, for all layers of a pass.

    Attributes:
        clear_from: The result of `TokenLayout.clear_from`.
        runs: The result of `TokenLayout.all_runs`.
        bias: Bias and mask of the whole pass, where `sdpa` stores them.
        blocks: Distances and block mask of FlexAttention.
        near_blocks: Block masks of FlexAttention with windows. The key is the number of full blocks of each head.
    """

    clear_from: int | None = None
    runs: Runs | None = None
    bias: Tensor | None = None
    blocks: Any = None
    near_blocks: dict[tuple[int, ...], Any] = field(default_factory=dict)


class TokenLayout(NamedTuple):
    """Positions and visibility of the queries and keys of a forward pass.

    Attributes:
        slopes: `[heads]`, the slopes of all query heads. Position methods whose bias is not linear put
            `[heads, distances]` here, the bias of every head at the distances 0, 1, 2 and so on.
        queries: `[batch or 1, queries]`, positions.
        keys: `[batch or 1, keys]`, positions.
        shared: Results that are computed once for all layers.
        first: `[batch, queries]`, the position at which each query's document begins; `None` if all begin at 0.
        key_mask: `[batch, keys]`, False at padding; `None` without padding.
        query_mask: `[batch, queries]`, False at padding whose output is unused. The output of padding is used directly
            before a token and at the end of a row, where a text may continue. Such padding sees the same keys as the
            token before it.
        mask: `[batch or 1, heads or 1, queries, keys]`, the caller's own mask, either boolean (True: visible) or added
            to the scores. It replaces `first`, `key_mask` and causality.
        length: Number of cached and new tokens, if only the future is hidden. The queries then belong to the last of
            the first `length` keys. `None` if more is hidden.
        runs: The runs of the batch, if they are cheaper than a mask. They contain the same information as the other
            attributes. `None` for few queries with a cache, with padding inside texts, or with a mask of the caller.
        exchange: With context parallelism, a function that returns the keys and values of this layout, given the
            queries, keys and values of this rank, the slopes, the factor of the scores, and the window tolerance.
    """

    slopes: Tensor
    queries: Tensor
    keys: Tensor
    shared: Shared
    first: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    mask: Tensor | None = None
    length: int | None = None
    runs: Runs | None = None
    exchange: Callable[..., tuple[Tensor, Tensor]] | None = None

    def to(self, device: Any, **kwargs: Any) -> "TokenLayout":
        """Returns a copy on another device, with no shared results yet."""
        moved: dict[str, Any] = {
            name: value.to(device, **kwargs)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor | Runs)
        }
        return self._replace(**moved | {"shared": Shared()})

    def visible(self, rows: slice) -> Tensor:
        """Returns which keys the queries in `rows` see, `[batch or 1, 1, rows, keys]`, boolean. Ignores `mask`."""
        queries, keys = self.queries[:, None, rows, None], self.keys[:, None, None, :]
        visible = keys <= queries
        if self.first is not None:
            visible = visible & (keys >= self.first[:, None, rows, None])
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, None, :]
        return visible

    def positions(self) -> Tensor:
        """Returns the position of every query in its document, `[batch or 1, queries]`, counted from 0."""
        return self.queries if self.first is None else self.queries - self.first

    def text_length(self) -> Tensor:
        """Returns the length of the longest text in the batch, in tokens, as a tensor without dimensions.

        Cached tokens count, padding does not, and each packed document is a text of its own. With a mask of the
        caller, the length follows from the positions.
        """
        return self.positions().max() + 1

    def num_distances(self) -> int:
        """Returns a number that exceeds the distance of every query from every key that it may see."""
        if self.mask is None or not has_values(self.queries):
            return self.keys.shape[1]
        # The caller's positions may be further apart than there are keys.
        (first_query, last_query), (first_key, last_key) = self.queries.aminmax(), self.keys.aminmax()
        return int(torch.maximum(last_query - first_key, last_key - first_query)) + 1

    def is_one_document(self) -> bool:
        """Whether every row is one document."""
        return self.first is None or bool((self.first <= 0).all())

    def check_one_document(self) -> None:
        """Checks that every row is one document, as far as values are known.

        Raises:
            ValueError: If a row has several.
        """
        if has_values(self.queries) and not self.is_one_document():
            raise ValueError("A row with one label contains several documents: give each document a row of its own.")

    def clear_from(self) -> int:
        """Returns the index of the first key from which on only the future is hidden."""
        if self.shared.clear_from is None:
            hidden = torch.zeros_like(self.keys, dtype=torch.bool) if self.key_mask is None else ~self.key_mask
            if self.first is not None:
                hidden = hidden | (self.keys < self.first.amax(1, keepdim=True))
            ends = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
            self.shared.clear_from = int((hidden * ends).max())
        return self.shared.clear_from

    def all_runs(self, batch: int) -> Runs:
        """Returns the runs of a batch of padded or packed sequences, even where a mask would be cheaper."""
        if self.runs is not None:
            return self.runs
        if self.shared.runs is None:
            self.shared.runs = self._find_runs(batch, None)
        assert self.shared.runs is not None
        return self.shared.runs

    def _find_runs(self, batch: int, most_keys: int | None) -> Runs | None:
        queries = self.queries.expand(batch, -1)
        first = torch.zeros_like(queries) if self.first is None else self.first
        asked = torch.ones_like(queries, dtype=torch.bool) if self.query_mask is None else self.query_mask
        return find_runs(queries, first, asked, self.key_mask, self.keys.shape[1], most_keys)

    def dense_bias(self, slopes: Tensor, rows: slice) -> Tensor:
        """Returns bias and mask as one tensor that is added to the scores of the queries in `rows`.

        Hidden keys get the lowest finite value, not -inf, so that a query without any visible key has finite weights.

        Args:
            slopes: `[heads]`, the slopes of this rank's heads.
            rows: The queries.

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
    packing: Packing | None = None,
    cached_layer: int = 0,
) -> TokenLayout:
    """Returns the layout of one forward pass.

    Args:
        slopes: `[heads]`, the slopes of all query heads.
        inputs_embeds: `[batch, queries, hidden_size]`. Only its shape and device are used.
        attention_mask: `[batch or 1, tokens]`, cached tokens included: 0 for padding, and 1 or document numbers for
            real tokens. Or a four-dimensional mask as in `TokenLayout.mask`.
        position_ids: `[batch or 1, queries]`.
        past_key_values: The cache before this pass.
        packing: Further arguments that describe documents.
        cached_layer: Index of a layer whose part of the cache is on this rank.

    Raises:
        ValueError: If an argument does not fit the number of cached and new tokens, has the wrong type or shape, or
            contradicts another.
    """
    batch, num_queries = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    packing = packing or Packing()
    past, num_keys = 0, num_queries
    if past_key_values is not None:
        past = past_key_values.get_seq_length(cached_layer)
        num_keys, _ = past_key_values.get_mask_sizes(num_queries, cached_layer)
    tracing = not has_values(inputs_embeds)
    if isinstance(past, Tensor) and not tracing:
        past = int(past)
    slots = (_count(num_queries, device) + past)[None]
    keys = torch.arange(num_keys, device=device)[None]

    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask must be a tensor, [batch, tokens] or [batch, 1 or heads, queries, keys], not a "
            f"{type(attention_mask).__name__}."
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        if packing.names():
            raise ValueError(
                "An attention_mask with four dimensions alone decides which keys a query sees; leave out "
                f"{', '.join(packing.names())}."
            )
        _check_custom_mask(attention_mask, batch, len(slopes), num_queries, num_keys)
        return _custom_layout(slopes, slots, keys, attention_mask, position_ids, past)
    if attention_mask is None and position_ids is None and not packing.names():
        check_one_document(past_key_values, past)
        unknown = isinstance(past, Tensor) or is_exported()
        length = None if unknown else past + num_queries
        return TokenLayout(slopes, slots, keys, Shared(), length=length)

    queries, key_mask, query_mask, numbers = slots, None, None, None
    slots = slots.expand(batch, -1)
    is_token = keys < past + num_queries
    if attention_mask is not None:
        mask = _cover(attention_mask.to(device), batch, past, num_queries, num_keys)
        key_mask = is_token = mask != 0
        numbers = _document_numbers(mask, tracing)
        # Some engines for exported models would sum booleans in 8 bits.
        keys = key_mask.long().cumsum(-1) - 1
        queries = keys.gather(1, slots)
    real = is_token.expand(batch, -1).gather(1, slots)
    if attention_mask is not None:
        query_mask = real | (F.pad(real, (0, 1), value=True)[:, 1:] & (queries >= 0))
    tokens = Pass(
        slots, queries.expand(batch, -1), real, keys.expand(batch, -1), is_token.expand(batch, -1), past, tracing
    )
    first = document_starts(tokens, position_ids, numbers, packing, past_key_values)
    layout = TokenLayout(slopes, queries, keys, Shared(), first, key_mask, query_mask)
    if tracing or isinstance(past, Tensor):
        return layout
    return _simplified(layout, batch, past, past + num_queries)


def _count(number: int, device: torch.device) -> Tensor:
    """Returns the numbers below `number`, `[number]`."""
    # PyTorch cannot compile an `arange` with one element into FlexAttention's kernel for GPUs.
    return torch.arange(number, device=device) if number > 1 else torch.zeros(number, dtype=torch.long, device=device)


def _custom_layout(
    slopes: Tensor, slots: Tensor, keys: Tensor, mask: Tensor, position_ids: Tensor | None, past: int | Tensor
) -> TokenLayout:
    mask = mask.to(slots.device)
    if position_ids is None:
        return TokenLayout(slopes, slots, keys, Shared(), mask=mask)
    queries = position_ids.to(slots.device)
    if has_values(queries) and isinstance(past, int) and past > 0 and bool((queries.amin(1) != past).any()):
        raise ValueError(
            f"position_ids must continue at {past}, not at {queries.amin(1).tolist()}: with an attention_mask of four "
            f"dimensions, the cached tokens have the positions 0 to {past - 1}. For other positions pass an "
            "attention_mask of [batch, tokens], or all tokens at once without a cache."
        )
    keys = keys.repeat(queries.shape[0], 1).index_copy_(1, slots[0], queries)
    return TokenLayout(slopes, queries, keys, Shared(), mask=mask)


def _check_custom_mask(mask: Tensor, batch: int, heads: int, num_queries: int, num_keys: int) -> None:
    if mask.shape[-2:] != (num_queries, num_keys):
        raise ValueError(
            f"The attention mask has shape {tuple(mask.shape)}; with four dimensions the last two must be the "
            f"{num_queries} queries and {num_keys} keys of this pass."
        )
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(
            f"The attention mask has shape {tuple(mask.shape)}; with four dimensions the first two must be 1 or "
            f"{batch} texts and 1 or {heads} heads."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"An attention mask with four dimensions must be boolean or float, not {mask.dtype}.")
    if has_values(mask) and mask.is_floating_point() and bool((mask == 1).any() & ((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "An attention mask with four dimensions that is not boolean is added to the scores, but this one contains "
            "only ones and zeros. Make it boolean, or use 0 for visible and -inf for hidden."
        )


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
    return F.pad(mask, (0, max(0, num_keys - mask.shape[-1])))[:, :num_keys].expand(batch, -1)


def _document_numbers(mask: Tensor, tracing: bool) -> Tensor | None:
    """Returns the document numbers in a two-dimensional mask, `[batch, keys]`, or `None` if there are none."""
    if mask.dtype == torch.bool:
        return None
    if tracing:
        return mask.long()
    if bool(((mask < 0) | (mask != mask.floor())).any()):
        raise ValueError(
            "An attention mask with two dimensions must contain 0 for padding and 1 or document numbers for tokens; "
            f"this one contains {mask[(mask < 0) | (mask != mask.floor())][0].item()}."
        )
    return mask.long() if bool((mask > 1).any()) else None


def _simplified(layout: TokenLayout, batch: int, past: int, length: int) -> TokenLayout:
    """Returns the layout with `length` if only the future is hidden, or with `runs` if these are cheaper than a mask.

    Args:
        layout: The layout.
        batch: Number of rows.
        past: Number of cached tokens.
        length: Number of cached and new tokens.
    """
    key_mask = layout.key_mask
    no_padding = key_mask is None or bool(key_mask[:, :length].all())
    if no_padding and layout.is_one_document():
        return layout._replace(length=length)
    # For few queries with a cache, one call with a mask is faster than many runs.
    if past > 0 and layout.queries.shape[1] < QUERY_BLOCK:
        return layout
    # More keys than this would cost more than a mask saves.
    return layout._replace(runs=layout._find_runs(batch, most_keys=2 * batch * layout.keys.shape[1]))
