"""The windowed KV cache: each head holds the keys that it can still see, and lets go of the others.

With QK-norm the lossless windows (`windows.py`) are known before any data, so a key that has fallen out of
a head's window will never be needed again. The heads of a layer hold W_h keys each, together a constant:
memory and time of a decoded token do not grow with the text.

As long as that would save little, a layer holds the keys of all heads together, as any cache does. Beyond,
heads with similar windows share a ring: position p of the text lies in slot p modulo the ring's capacity,
and a new key takes the place of one that has left the window. Seen from the newest key, the bias of a
ring's slots is a periodic function, so that of any state of the ring is a view of one line
(`alibi.ring_line`): in a step nothing is moved, allocated or computed.

A ring has some slots to spare, which lets several tokens enter at once and the last ones be taken back.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .alibi import bias_view, causal_line, ring_line
from .layout import TokenLayout
from .windows import UNLIMITED

SPARE = 64  # slots beyond a window: tokens that may enter at once, or be taken back
SHARED_SLOTS = 2048  # slots that may go unused for heads to share a ring: reading them costs less than another call


class Ring:
    """The keys and values of some heads of a layer; the newest take the place of the oldest.

    Attributes:
        heads: `[heads]`, indices of its query heads.
        kv_heads: `[key_value_heads]`, indices of its key-value heads.
        slopes: `[heads]`.
        windows: How far back each of its query heads looks, `[heads]`.
        window: The widest of them.
        capacity: Positions that it can hold.
        lost: How many of the first positions it does not hold, or no longer.
        keys: `[batch, key_value_heads, slots, head_dim]`; it grows up to `capacity` slots.
        values: As `keys`.
    """

    def __init__(
        self, heads: Tensor, kv_heads: Tensor, slopes: Tensor, windows: Tensor, spare: int, like: Tensor
    ) -> None:
        self.heads, self.kv_heads, self.slopes, self.windows = heads, kv_heads, slopes, windows
        self.window = int(windows.max())
        self.capacity = self.window + 1 + spare
        self.lost = 0
        self.keys = self.values = like.new_zeros(len(like), len(kv_heads), 0, like.shape[3])
        self._lines: dict[tuple[int, bool], Tensor] = {}  # the newest alone

    def _line(self) -> tuple[Tensor, int]:
        """Returns the bias by offset from the newest slot, `[heads, offsets]`, and the index of offset 0.

        Until a position is lost that is the plain causal bias, and need not be longer than the text: a window may be.
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
        """Returns the bias of the last queries of a text, in reverse order, `[1, heads, queries, held]`."""
        line, newest = self._line()
        corner = newest - (length - 1) % self.capacity
        return bias_view(line, slice(0, len(self.heads)), num_queries, min(length, self.capacity), corner)

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Stores `[batch, key_value_heads, tokens, head_dim]` at the positions from `start` on."""
        end = start + keys.shape[2]
        self._reserve(min(end, self.capacity))
        for slots, positions in self._runs(max(start, end - self.capacity), end):
            tokens = slice(positions.start - start, positions.stop - start)
            self.keys[:, :, slots] = keys[:, :, tokens]
            self.values[:, :, slots] = values[:, :, tokens]
        self.lost = max(self.lost, end - self.capacity)

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values at the positions from `start` to `end`, in order."""
        runs = [slots for slots, _ in self._runs(start, end)]
        if len(runs) == 1:
            return self.keys[:, :, runs[0]], self.values[:, :, runs[0]]
        keys, values = (torch.cat([states[:, :, slots] for slots in runs], 2) for states in (self.keys, self.values))
        return keys, values

    def can_take_back(self, length: int) -> bool:
        """Whether a text can go on from `length` again, with nothing lost that its next token sees."""
        return self.lost <= max(0, length - self.window)

    def _runs(self, start: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Cuts a run of positions where the ring closes; yields their slots and themselves."""
        while start < end:
            slot = start % self.capacity
            stop = min(end, start + self.capacity - slot)
            yield slice(slot, slot + stop - start), slice(start, stop)
            start = stop

    def _reserve(self, slots: int) -> None:
        """Makes room, twice what there was at least; zeros, as what is hidden must yet be finite."""
        held = self.keys.shape[2]
        if slots > held:
            room = min(self.capacity, max(slots, 2 * held)) - held
            self.keys, self.values = (
                torch.cat([states, states.new_zeros(*states.shape[:2], room, states.shape[3])], 2)
                for states in (self.keys, self.values)
            )


class HeldKeys(NamedTuple):
    """The keys that the queries of a pass find with the heads of one ring.

    Attributes:
        ring: Where they are held.
        keys: `[batch, key_value_heads, held, head_dim]`.
        values: As `keys`.
        length: Tokens of the text, those of the pass included.
        in_order: Whether the keys are in the order of the text, or of the ring's slots.
    """

    ring: Ring
    keys: Tensor
    values: Tensor
    length: int
    in_order: bool

    def only_future_is_hidden(self, layout: TokenLayout) -> bool:
        """Whether the queries see every token that their windows reach; `layout` is that of the whole text."""
        if layout.length is not None or layout.mask is not None:
            return layout.mask is None
        return layout.clear_from() <= max(0, self.length - layout.queries.shape[1] - self.ring.window)

    def layout(self, layout: TokenLayout) -> TokenLayout:
        """Returns the part of the whole text's layout that is about these heads and keys.

        Raises:
            ValueError: If a query sees a token that is no longer held, there being padding between the two.
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
                "Padding between tokens, or a mask with four dimensions, needs keys that the windowed cache has let "
                "go; generate with cache_implementation='dynamic', or pass a DynamicCache."
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


class WindowedLayer(CacheLayerMixin):
    """The cache of one layer.

    Args:
        windows: How far back each query head looks.
        slopes: `[heads]`, the slopes of the query heads.

    Attributes:
        keys: Those of all heads, `[batch, key_value_heads, length, head_dim]`, as long as they are held together;
            `None` after that.
        values: As `keys`.
    """

    is_croppable = True

    def __init__(self, windows: Sequence[int], slopes: Tensor) -> None:
        super().__init__()
        self.windows, self.slopes = list(windows), slopes
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.rings: list[Ring] = []
        self.length = 0
        self.spare = SPARE
        self.recorded = 0  # tokens since the last crop, which the next may take back
        self.is_initialized = False
        self._show()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty layer for states like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.slopes = self.slopes.to(self.device)
        num_kv_heads = key_states.shape[1]
        size = len(self.windows) // num_kv_heads
        self.kv_windows = [max(self.windows[size * head : size * (head + 1)]) for head in range(num_kv_heads)]
        self.rings = [self._ring(list(range(num_kv_heads)), key_states, limited=False)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Adds the tokens of a pass.

        Args:
            key_states: `[batch, key_value_heads, tokens, head_dim]`.
            value_states: As `key_states`.

        Returns:
            Keys and values of the whole text, `[batch, key_value_heads, length, head_dim]`; or, where that is no
            longer held, a list of `HeldKeys` in place of the keys, and `None`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, tokens = self.length, key_states.shape[2]
        self.length += tokens
        self.recorded += tokens
        if self._are_together():
            return self._update_together(key_states, value_states, past)
        if self.record_past and self.recorded > self.spare:
            self._resize(2 * self.recorded, past)
        held = []
        for ring in self.rings:
            keys, values = key_states[:, ring.kv_heads], value_states[:, ring.kv_heads]
            in_order = tokens >= ring.capacity - ring.window
            if in_order:
                before = ring.read(max(0, past - ring.window), past)
                keys, values = (torch.cat(pair, 2) for pair in zip(before, (keys, values), strict=True))
            ring.write(keys[:, :, -tokens:], values[:, :, -tokens:], past)
            if not in_order:
                keys, values = ring.keys[:, :, : self.length], ring.values[:, :, : self.length]
            held.append(HeldKeys(ring, keys, values, self.length, in_order))
        return held, None

    def _update_together(self, keys: Tensor, values: Tensor, past: int) -> tuple[Tensor, Tensor]:
        divide = self._should_divide() and not self.record_past
        if not divide or past > 0:  # a long prompt need not be held as a whole
            self.rings[0].write(keys, values, past)
            keys, values = self.rings[0].read(0, self.length)
        if divide:
            self._divide(keys, values)
        self._show()
        return keys, values

    def _are_together(self) -> bool:
        return self.rings[0].window == UNLIMITED

    def _should_divide(self) -> bool:
        """Whether the windows let go of half of all keys, or more."""
        held = sum(min(window, self.length) for window in self.kv_windows)
        return self._are_together() and 2 * held <= len(self.kv_windows) * self.length

    def _divide(self, keys: Tensor, values: Tensor) -> None:
        """Hands the text, `[batch, key_value_heads, length, head_dim]`, over to a ring for each group of heads."""
        groups: list[list[int]] = []
        for head in sorted(range(len(self.kv_windows)), key=self.kv_windows.__getitem__):
            if groups and sum(self.kv_windows[head] - self.kv_windows[i] for i in groups[-1]) <= SHARED_SLOTS:
                groups[-1].append(head)
            else:
                groups.append([head])
        self.rings = [self._ring(group, keys, limited=True) for group in groups]
        for ring in self.rings:
            ring.write(keys[:, ring.kv_heads], values[:, ring.kv_heads], 0)

    def _ring(self, kv_heads: list[int], like: Tensor, limited: bool) -> Ring:
        size = len(self.windows) // len(self.kv_windows)
        heads = [size * head + i for head in kv_heads for i in range(size)]
        windows = torch.tensor([self.windows[head] if limited else UNLIMITED for head in heads])
        query_index, key_index = (torch.tensor(index, device=self.device) for index in (heads, kv_heads))
        return Ring(query_index, key_index, self.slopes[query_index], windows, self.spare, like)

    def _resize(self, spare: int, length: int) -> None:
        """Gives the rings that many slots to spare; they hold the text up to `length`."""
        self.spare = spare
        for i, old in enumerate(self.rings):
            self.rings[i] = ring = Ring(old.heads, old.kv_heads, old.slopes, old.windows, spare, old.keys)
            ring.lost = max(old.lost, length - ring.capacity)
            ring.write(*old.read(ring.lost, length), ring.lost)

    def activate_past_recording(self) -> None:
        """From now on keeps all that a crop may take back, which is what has come since the last one."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens.

        Args:
            tokens_to_remove: How many, negative or 0.

        Raises:
            ValueError: If it is positive.
            RuntimeError: If the last tokens that would remain see keys that have been overwritten.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove, negative, got {tokens_to_remove}.")
        length = max(0, self.length + tokens_to_remove)
        if length == 0:
            self.reset()
            return
        if not all(ring.can_take_back(length) for ring in self.rings):
            raise RuntimeError(
                f"Cannot take back {-tokens_to_remove} tokens: keys that have left a head's window since are gone. "
                "Call activate_past_recording() before they are added, or use a DynamicCache."
            )
        self.length, self.recorded = length, 0
        if self._should_divide():
            self._divide(*self.rings[0].read(0, length))
        elif not self._are_together() and self.spare > SPARE:
            self._resize(SPARE, length)
        self._show()

    def get_seq_length(self) -> int:
        """Returns the number of tokens of the text, whether or not their keys are still held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the tokens after a pass of `query_length` tokens, and 0, the first that a mask is to cover."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: a text of any length fits."""
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes sequence `beam_idx[i]` of the batch for each sequence i."""
        self._change(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` of the batch."""
        self._change(lambda states: states[indices])

    def offload(self) -> None:
        """Moves keys and values to the CPU."""
        self._change(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves them back to where they came from."""
        self._change(lambda states: states.to(self.device, non_blocking=True))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for ring in self.rings:
            ring.keys, ring.values = change(ring.keys), change(ring.values)
        self._show()

    def _show(self) -> None:
        shown = self.length > 0 and self._are_together()
        self.keys, self.values = self.rings[0].read(0, self.length) if shown else (None, None)


class WindowedCache(Cache):
    """A cache in which each head holds no more than its window; attention through `sdpa` knows how to read it.

    Args:
        windows: How far back each query head of each layer looks, see `AlibiGPTModel.windowed_cache`.
        slopes: `[heads]`, the slopes of the query heads.
        offloading: Whether keys and values wait on the CPU while other layers are at work.
        made_for: What the windows follow from, for the model to see whether it is still so; `None`: it trusts them.
    """

    max_cache_len = -1  # no limit; PEFT asks every cache of `generate` but Transformers' own dynamic one for it

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        slopes: Tensor,
        offloading: bool = False,
        made_for: Tensor | None = None,
    ) -> None:
        super().__init__(layers=[WindowedLayer(of_layer, slopes) for of_layer in windows], offloading=offloading)
        self.made_for = made_for
