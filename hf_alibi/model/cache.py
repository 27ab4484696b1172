"""The windowed KV cache: each head keeps only the keys inside its window.

With QK-norm the lossless windows (`windows.py`) are known in advance, so a key that has left a head's window is never
needed again. Head h of a layer keeps W_h keys. Memory and time per decoded token therefore do not grow with the text.

While the text is short, a layer keeps the keys of all heads in one tensor, like any cache. Once windows save enough,
heads with similar windows share a ring buffer. Position p of the text is stored in slot p modulo the capacity of the
ring, so a new key overwrites one that has left the window. Relative to the newest key, the bias of the slots is a
periodic function. The bias for every state of the ring is thus a view of one line (`alibi.ring_line`), and a decoding
step moves no keys and computes no bias.

A ring has spare slots beyond the window. They allow several tokens to be added in one pass, and the last tokens to be
removed again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .alibi import bias_view, causal_line, ring_line
from .layout import TokenLayout
from .windows import UNLIMITED

# Slots of a ring beyond its window. A pass may add, and a crop may remove, this many tokens without copying the
# window. More slots take memory, and every decoding step reads them although they are masked.
SPARE = 64
# Unused slots up to which heads with different windows share a ring. A larger number takes more memory and reads more
# slots; a smaller number gives more rings, each of which needs a kernel call per step. It suits PyTorch 2.13 on 2 CPU
# cores (AMD EPYC), measured with `hf_alibi benchmark generation`.
SHARED_SLOTS = 2048


class Ring:
    """A ring buffer with the keys and values of some heads of a layer. The newest overwrite the oldest.

    Attributes:
        heads: `[heads]`, indices of its query heads.
        kv_heads: `[key_value_heads]`, indices of its key-value heads.
        slopes: `[heads]`, the slopes of its query heads.
        windows: `[heads]`, the distance that each of its query heads sees.
        window: The largest of `windows`.
        capacity: Maximum number of positions.
        lost: Number of positions at the start of the text that the ring no longer stores, or never did.
        keys: `[batch, key_value_heads, slots, head_dim]`. It grows up to `capacity` slots.
        values: `[batch, key_value_heads, slots, head_dim]`.
    """

    def __init__(
        self, heads: Tensor, kv_heads: Tensor, slopes: Tensor, windows: Tensor, spare: int, like: Tensor
    ) -> None:
        self.heads, self.kv_heads, self.slopes, self.windows = heads, kv_heads, slopes, windows
        self.window = int(windows.max())
        self.capacity = self.window + 1 + spare
        self.lost = 0
        self.keys = self.values = like.new_zeros(len(like), len(kv_heads), 0, like.shape[3])
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
        return bias_view(line, slice(0, len(self.heads)), num_queries, min(length, self.capacity), corner)

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Stores keys and values `[batch, key_value_heads, tokens, head_dim]` at the positions from `start` on."""
        end = start + keys.shape[2]
        self._reserve(min(end, self.capacity))
        for slots, positions in self._runs(max(start, end - self.capacity), end):
            tokens = slice(positions.start - start, positions.stop - start)
            self.keys[:, :, slots] = keys[:, :, tokens]
            self.values[:, :, slots] = values[:, :, tokens]
        self.lost = max(self.lost, end - self.capacity)

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of the positions from `start` up to, but not including, `end`, in order."""
        runs = [slots for slots, _ in self._runs(start, end)]
        if len(runs) == 1:
            return self.keys[:, :, runs[0]], self.values[:, :, runs[0]]
        keys, values = (torch.cat([states[:, :, slots] for slots in runs], 2) for states in (self.keys, self.values))
        return keys, values

    def can_take_back(self, length: int) -> bool:
        """Whether the text can be cut to `length` tokens: no key that its next token sees has been overwritten."""
        return self.lost <= max(0, length - self.window)

    def _runs(self, start: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Splits a range of positions at the end of the buffer; yields slices of slots and of positions."""
        while start < end:
            slot = start % self.capacity
            stop = min(end, start + self.capacity - slot)
            yield slice(slot, slot + stop - start), slice(start, stop)
            start = stop

    def _reserve(self, slots: int) -> None:
        """Grows the buffers to at least twice their size, within capacity.

        New slots are zero: masked keys must still be finite.
        """
        held = self.keys.shape[2]
        if slots > held:
            room = min(self.capacity, max(slots, 2 * held)) - held
            self.keys, self.values = (
                torch.cat([states, states.new_zeros(*states.shape[:2], room, states.shape[3])], 2)
                for states in (self.keys, self.values)
            )


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


class WindowedLayer(CacheLayerMixin):
    """The cache of one layer.

    Args:
        windows: The distance that each query head sees.
        slopes: `[heads]`, the slopes of the query heads.

    Attributes:
        keys: `[batch, key_value_heads, length, head_dim]`, the keys of all heads while one ring holds them; `None`
            after that.
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
        # Tokens since the last crop. The next crop may remove all of them.
        self.recorded = 0
        self.is_initialized = False
        self._show()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Creates empty buffers for states of this dtype, device and shape."""
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
            value_states: `[batch, key_value_heads, tokens, head_dim]`.

        Returns:
            Keys and values of the whole text, `[batch, key_value_heads, length, head_dim]`. Once several rings hold
            them: a list of `HeldKeys`, and `None`.
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
        # A long first prompt goes to the rings directly; it is never stored as a whole.
        if not divide or past > 0:
            self.rings[0].write(keys, values, past)
            keys, values = self.rings[0].read(0, self.length)
        if divide:
            self._divide(keys, values)
        self._show()
        return keys, values

    def _are_together(self) -> bool:
        return self.rings[0].window == UNLIMITED

    def _should_divide(self) -> bool:
        """Whether dividing the heads into rings would drop at least half of all keys."""
        held = sum(min(window, self.length) for window in self.kv_windows)
        return self._are_together() and 2 * held <= len(self.kv_windows) * self.length

    def _divide(self, keys: Tensor, values: Tensor) -> None:
        """Groups heads with similar windows and stores the keys and values of the whole text in one ring per group.

        Args:
            keys: `[batch, key_value_heads, length, head_dim]`.
            values: `[batch, key_value_heads, length, head_dim]`.
        """
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
        """Replaces the rings by rings with `spare` spare slots. The present ones hold the text up to `length`."""
        self.spare = spare
        for i, old in enumerate(self.rings):
            self.rings[i] = ring = Ring(old.heads, old.kv_heads, old.slopes, old.windows, spare, old.keys)
            ring.lost = max(old.lost, length - ring.capacity)
            ring.write(*old.read(ring.lost, length), ring.lost)

    def activate_past_recording(self) -> None:
        """Keeps, from now on, what is needed to crop all tokens that were added since the last crop."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens.

        Args:
            tokens_to_remove: Minus the number of tokens to remove.

        Raises:
            ValueError: If `tokens_to_remove` is positive.
            RuntimeError: If the next token would see keys that have been overwritten.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "crop takes minus the number of tokens to remove, such as -3 for three tokens; "
                f"got {tokens_to_remove}."
            )
        length = max(0, self.length + tokens_to_remove)
        if length == 0:
            self.reset()
            return
        if not all(ring.can_take_back(length) for ring in self.rings):
            raise RuntimeError(
                f"Cannot remove the last {-tokens_to_remove} tokens: they have overwritten keys that are inside a "
                "head's window again without them. Call activate_past_recording() before adding tokens that you may "
                "remove, or use a DynamicCache."
            )
        self.length, self.recorded = length, 0
        if self._should_divide():
            self._divide(*self.rings[0].read(0, length))
        elif not self._are_together() and self.spare > SPARE:
            self._resize(SPARE, length)
        self._show()

    def get_seq_length(self) -> int:
        """Returns the number of tokens in the text, including those whose keys are no longer stored."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of tokens after a pass of `query_length` tokens, and the offset of the first one, 0.

        A mask covers the whole text, including tokens whose keys are no longer stored.
        """
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1, which means that there is no limit."""
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replaces each sequence i of the batch by sequence `beam_idx[i]`."""
        self._change(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the sequences `indices` of the batch."""
        self._change(lambda states: states[indices])

    def offload(self) -> None:
        """Moves keys and values to the CPU."""
        self._change(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves keys and values back to the device of the layer."""
        self._change(lambda states: states.to(self.device, non_blocking=True))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for ring in self.rings:
            ring.keys, ring.values = change(ring.keys), change(ring.values)
        self._show()

    def _show(self) -> None:
        shown = self.length > 0 and self._are_together()
        self.keys, self.values = self.rings[0].read(0, self.length) if shown else (None, None)


class WindowedCache(Cache):
    """A cache in which each head keeps only the keys inside its window. Only the `sdpa` backend can read it.

    `AlibiGPTModel.windowed_cache` makes one with lossless windows.

    Args:
        windows: The distance that each query head of each layer sees.
        slopes: `[heads]`, the slopes of the query heads.
        offloading: Whether keys and values are kept on the CPU while other layers compute.
        made_for: The slopes and gains from which the windows were computed. The model compares them with its own
            before it uses the cache; `None` for no comparison.
    """

    # No limit. PEFT reads this attribute of every cache except Transformers' dynamic one.
    max_cache_len = -1

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        slopes: Tensor,
        offloading: bool = False,
        made_for: Tensor | None = None,
    ) -> None:
        super().__init__(layers=[WindowedLayer(of_layer, slopes) for of_layer in windows], offloading=offloading)
        self.made_for = made_for
