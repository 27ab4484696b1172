"""The windowed KV cache: each head keeps only the keys inside its window.

With QK-norm the lossless windows (`windows.py`) are known in advance, so a key that has left a head's window is never
needed again. Head h of a layer keeps W_h keys. Memory and time per decoded token therefore do not grow with the text.

While the text is short, a layer keeps all keys, as in `growing.py`. Once windows save enough, heads with similar
windows share a ring buffer. Position p of the text is stored in slot p modulo the capacity of the ring, so a new key
overwrites one that has left the window. Relative to the newest key, the bias of the slots is a periodic function. The
bias for every state of the ring is thus a view of one line (`alibi.ring_line`), and a decoding step moves no keys and
computes no bias.

A ring has spare slots beyond the window. They allow several tokens to be added in one pass, and the last tokens to be
removed again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .alibi import bias_view, causal_line, ring_line
from .growing import Buffer, GrowingCache, GrowingLayer
from .layout import TokenLayout
from .tiles import neighbours

# Slots of a ring beyond its window. A pass may add, and a crop may remove, this many tokens without copying the
# window. More slots take memory, and every decoding step reads them although they are masked.
SPARE = 64


Index = slice | Tensor


class Ring(Buffer):
    """A ring buffer with the keys and values of some heads of a layer. The newest overwrite the oldest.

    Attributes:
        heads: Index of its query heads: a slice if they are consecutive, which copies nothing, else `[heads]`.
        kv_heads: The same for its key-value heads.
        slopes: `[heads]`, the slopes of its query heads.
        windows: `[heads]`, the distance that each of its query heads sees.
        window: The largest of `windows`.
    """

    def __init__(self, heads: Index, kv_heads: Index, slopes: Tensor, windows: Tensor, spare: int) -> None:
        self.heads, self.kv_heads, self.slopes, self.windows = heads, kv_heads, slopes, windows
        self.window = int(windows.max())
        super().__init__(self.window + 1 + spare)
        # Holds the latest line only.
        self._lines: dict[tuple[int, bool], Tensor] = {}

    def _line(self) -> tuple[Tensor, int]:
        """Returns the bias by offset from the newest slot, `[heads, offsets]`, and the index of offset 0.

        Until a position is lost, this is the plain causal bias. It is then as long as the text, not as the window,
        which may be far longer.
        """
        slots, is_closed = self.keys.shape[2], self.lost > 0
        if (slots, is_closed) not in self._lines:
            if is_closed:
                line = ring_line(self.slopes, self.window, self.capacity)
            else:
                line = causal_line(self.slopes, behind=slots - 1, ahead=self.capacity - self.window - 1)
            self._lines = {(slots, is_closed): line}
        return self._lines[slots, is_closed], (self.capacity if is_closed else slots) - 1

    def bias(self, num_queries: int, length: int) -> Tensor:
        """Returns the bias of the last queries of a text, in reverse order, `[1, heads, queries, slots in use]`."""
        line, newest = self._line()
        corner = newest - (length - 1) % self.capacity
        return bias_view(line, slice(0, len(self.windows)), num_queries, min(length, self.capacity), corner)

    def can_take_back(self, length: int) -> bool:
        """Whether the text can be cut to `length` tokens: no key that its next token sees has been overwritten."""
        return self.lost <= max(0, length - self.window)


class HeldKeys(NamedTuple):
    """The keys and values that one pass reads from one ring.

    Attributes:
        ring: The ring.
        keys: `[batch, key_value_heads, held, head_dim]`.
        values: `[batch, key_value_heads, held, head_dim]`.
        length: Number of tokens in the text, including those of the pass.
        in_order: True if the keys are in the order of the text, False if in the order of the ring's slots.
    """

    ring: Ring
    keys: Tensor
    values: Tensor
    length: int
    in_order: bool

    def only_future_is_hidden(self, layout: TokenLayout) -> bool:
        """Whether the queries see every token inside their windows. `layout` describes the whole text."""
        if layout.length is not None or layout.mask is not None:
            return layout.mask is None
        return layout.clear_from() <= max(0, self.length - layout.queries.shape[1] - self.ring.window)

    def layout(self, layout: TokenLayout) -> TokenLayout:
        """Returns the part of the whole text's layout that belongs to these heads and keys.

        Raises:
            ValueError: If a query sees a token whose key is no longer stored. This happens with padding between them
                or with a four-dimensional mask.
        """
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)
        newest = self.length - 1
        lost = self.ring.lost
        if self.in_order:
            lost = self.length - len(slots)
            positions = lost + slots
        else:
            positions = newest - (newest - slots) % self.ring.capacity
        first = (layout.queries - self.ring.window).clamp(min=0)
        if layout.first is not None:
            first = first.maximum(layout.first)
        if lost > 0 and (layout.mask is not None or bool((layout.keys[:, lost - 1, None] >= first).any())):
            raise ValueError(
                "Padding between tokens, or a mask with four dimensions, needs keys that the windowed cache no longer "
                "stores. Generate with cache_implementation='dynamic', or pass a DynamicCache."
            )
        mask = layout.mask
        if mask is not None:
            mask = (mask if mask.shape[1] == 1 else mask[:, self.ring.heads])[..., positions]
        return layout._replace(
            slopes=layout.slopes[self.ring.heads],
            keys=layout.keys[:, positions],
            first=first,
            key_mask=None if layout.key_mask is None else layout.key_mask[:, positions],
            mask=mask,
        )


class WindowedLayer(GrowingLayer):
    """The cache of one layer. Like its base class, until windows save enough; then heads are divided into rings.

    Args:
        windows: The distance that each query head sees.
        slopes: `[heads]`, the slopes of the query heads.
    """

    def __init__(self, windows: Sequence[int], slopes: Tensor) -> None:
        self.windows, self.slopes = list(windows), slopes
        self.record_past = False
        super().__init__()

    def reset(self) -> None:
        """Forgets everything."""
        self.spare = SPARE
        # Tokens since the last crop. The next crop may remove all of them.
        self.recorded = 0
        self.is_divided = False
        super().reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Creates empty buffers for states of this dtype, device and shape."""
        super().lazy_initialization(key_states, value_states)
        self.slopes = self.slopes.to(self.device)
        num_kv_heads = key_states.shape[1]
        size = len(self.windows) // num_kv_heads
        self.kv_windows = [max(self.windows[size * head : size * (head + 1)]) for head in range(num_kv_heads)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Adds the tokens of a pass.

        Args:
            key_states: `[batch, key_value_heads, tokens, head_dim]`.
            value_states: `[batch, key_value_heads, tokens, head_dim]`.

        Returns:
            Keys and values of the whole text, `[batch, key_value_heads, length, head_dim]`. Once several rings hold
            them: a list of `HeldKeys`, and `None`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.recorded += key_states.shape[2]
        if self.is_divided:
            return self._update_rings(key_states, value_states), None
        if self.record_past or not self._should_divide(self.length + key_states.shape[2]):
            return super().update(key_states, value_states)
        # A long first prompt goes to the rings directly; it is never stored as a whole.
        if self.length > 0:
            key_states, value_states = super().update(key_states, value_states)
        self._divide(key_states, value_states)
        return key_states, value_states

    def _update_rings(self, key_states: Tensor, value_states: Tensor) -> list[HeldKeys]:
        past, tokens = self.length, key_states.shape[2]
        self.length += tokens
        if self.record_past and self.recorded > self.spare:
            self._resize(2 * self.recorded, past)
        held = []
        for ring in self.buffers:
            keys, values = key_states[:, ring.kv_heads], value_states[:, ring.kv_heads]
            in_order = tokens >= ring.capacity - ring.window
            if in_order:
                before = ring.read(max(0, past - ring.window), past)
                keys, values = (torch.cat(pair, 2) for pair in zip(before, (keys, values), strict=True))
            ring.write(keys[:, :, -tokens:], values[:, :, -tokens:], past)
            if not in_order:
                keys, values = ring.keys[:, :, : self.length], ring.values[:, :, : self.length]
            held.append(HeldKeys(ring, keys, values, self.length, in_order))
        return held

    def _should_divide(self, length: int) -> bool:
        """Whether dividing the heads into rings would drop at least half of all keys."""
        held = sum(min(window, length) for window in self.kv_windows)
        return not self.is_divided and 2 * held <= len(self.kv_windows) * length

    def _divide(self, keys: Tensor, values: Tensor) -> None:
        """Groups heads with similar windows and stores the keys and values of the whole text in one ring per group.

        Args:
            keys: `[batch, key_value_heads, length, head_dim]`.
            values: `[batch, key_value_heads, length, head_dim]`.
        """
        order = sorted(range(len(self.kv_windows)), key=self.kv_windows.__getitem__)
        groups = neighbours([self.kv_windows[head] for head in order])
        self.length, self.is_divided, self.key_norms = keys.shape[2], True, None
        self.buffers = [self._ring(order[group]) for group in groups]
        for ring in self.buffers:
            ring.write(keys[:, ring.kv_heads], values[:, ring.kv_heads], 0)
        self._show()

    def _ring(self, kv_heads: list[int]) -> Ring:
        size = len(self.windows) // len(self.kv_windows)
        heads = [size * head + i for head in kv_heads for i in range(size)]
        windows = torch.tensor([self.windows[head] for head in heads])
        query_index, key_index = self._index(heads), self._index(kv_heads)
        return Ring(query_index, key_index, self.slopes[query_index], windows, self.spare)

    def _index(self, heads: list[int]) -> Index:
        first = heads[0]
        if heads == list(range(first, first + len(heads))):
            return slice(first, first + len(heads))
        return torch.tensor(heads, device=self.device)

    def _resize(self, spare: int, length: int) -> None:
        """Replaces the rings by rings with `spare` spare slots. The present ones hold the text up to `length`."""
        self.spare = spare
        for i, old in enumerate(self.buffers):
            self.buffers[i] = ring = Ring(old.heads, old.kv_heads, old.slopes, old.windows, spare)
            ring.lost = max(old.lost, length - ring.capacity)
            keys, values = old.read(ring.lost, length)
            ring.write(keys, values, ring.lost)

    def activate_past_recording(self) -> None:
        """Keeps, from now on, what is needed to crop all tokens that were added since the last crop."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, see `GrowingLayer.crop`."""
        super().crop(tokens_to_remove)
        self.recorded = 0
        if not self.is_initialized:
            return
        if self._should_divide(self.length):
            self._divide(*self.buffers[0].read(0, self.length))
        elif self.is_divided and self.spare > SPARE:
            self._resize(SPARE, self.length)

    def _show(self) -> None:
        if self.is_divided:
            self.keys = self.values = None
        else:
            super()._show()


class WindowedCache(GrowingCache):
    """A cache in which each head keeps only the keys inside its window. Only the `sdpa` backend can read it.

    `AlibiGPTModel.windowed_cache` makes one with lossless windows.

    Args:
        windows: The distance that each query head of each layer sees.
        slopes: `[heads]`, the slopes of the query heads.
        offloading: Whether keys and values are kept on the CPU while other layers compute.
        made_for: The slopes and gains from which the windows were computed. The model compares them with its own
            before it uses the cache; `None` for no comparison.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        slopes: Tensor,
        offloading: bool = False,
        made_for: Tensor | None = None,
    ) -> None:
        super().__init__([WindowedLayer(of_layer, slopes) for of_layer in windows], offloading)
        self.made_for = made_for
