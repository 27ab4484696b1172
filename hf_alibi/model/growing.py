"""A KV cache that keeps every key, in buffers that grow by an eighth when they are full.

A decoded token is written into a free slot. `DynamicCache` copies the whole cache instead, for every token. The keys
and values that a pass gets are views of the buffers, in the order of the text, so every backend can read them.

On the CPU a layer also keeps the largest norm of its keys. It bounds the scores of new queries, so each head has a
window (`windows.py`) without a pass over the keys. No key is dropped: another query may have a wider window.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .windows import UNLIMITED, largest_norms

# A full buffer grows by this fraction of its slots, or by MIN_GROWTH slots. A larger fraction takes more memory; a
# smaller one copies the keys more often, with 1/8 about eight times in all.
GROWTH = 1 / 8
MIN_GROWTH = 64


class Buffer:
    """Keys and values of some heads of a layer. Once it is at its capacity, the newest overwrite the oldest.

    Position p of the text is stored in slot p modulo the capacity.

    Attributes:
        capacity: Maximum number of positions.
        lost: Number of positions at the start of the text that the buffer no longer stores, or never did.
        keys: `[batch, key_value_heads, slots, head_dim]`, up to `capacity` slots; `None` before the first token.
        values: As `keys`. The last dimension may have another size.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lost = 0
        self.keys: Any = None
        self.values: Any = None

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Stores keys and values `[batch, key_value_heads, tokens, head_dim]` at the positions from `start` on."""
        end = start + keys.shape[2]
        # One after the other, so that only one old buffer is in memory.
        self.keys = self._with_room(self.keys, min(end, self.capacity), keys)
        self.values = self._with_room(self.values, min(end, self.capacity), values)
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
        return self.lost == 0

    def _runs(self, start: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Splits a range of positions at the end of the buffer; yields slices of slots and of positions."""
        while start < end:
            slot = start % self.capacity
            stop = min(end, start + self.capacity - slot)
            yield slice(slot, slot + stop - start), slice(start, stop)
            start = stop

    def _with_room(self, states: Tensor | None, slots: int, new: Tensor) -> Tensor:
        """Returns a buffer with the same states and at least `slots` slots, for states like `new`.

        New slots are zero: masked keys must still be finite.
        """
        held = 0 if states is None else states.shape[2]
        if states is not None and slots <= held:
            return states
        size = min(self.capacity, max(slots, held + max(MIN_GROWTH, int(held * GROWTH))))
        grown = new.new_empty(*new.shape[:2], size, new.shape[3])
        if states is not None:
            grown[:, :, :held] = states
        grown[:, :, held:] = 0
        return grown


class GrowingLayer(CacheLayerMixin):
    """The cache of one layer, which keeps every key.

    Attributes:
        buffers: The buffers with the keys and values. This class has a single one.
        length: Number of tokens in the text.
        keys: `[batch, key_value_heads, length, head_dim]`, a view; `None` while there are none.
        values: As `keys`.
        key_norms: `[key_value_heads]`, a bound of the norms of all keys; `None` if unknown.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.buffers: list[Any] = []
        self.length = 0
        self.key_norms: Tensor | None = None
        self.is_initialized = False
        self._show()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Creates empty buffers for states of this dtype, device and shape."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = [Buffer(UNLIMITED)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Adds the tokens of a pass.

        Args:
            key_states: `[batch, key_value_heads, tokens, head_dim]`.
            value_states: `[batch, key_value_heads, tokens, head_dim]`.

        Returns:
            Keys and values of the whole text, `[batch, key_value_heads, length, head_dim]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # These views would keep the old buffers in memory while they grow.
        self.keys = self.values = None
        self.buffers[0].write(key_states, value_states, self.length)
        self.length += key_states.shape[2]
        # Elsewhere no backend asks for it.
        if self.device.type == "cpu" and key_states.numel() > 0:
            norms = largest_norms(key_states)
            self.key_norms = norms if self.key_norms is None else self.key_norms.maximum(norms)
        self._show()
        return self.keys, self.values

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
        if not all(buffer.can_take_back(length) for buffer in self.buffers):
            raise RuntimeError(
                f"Cannot remove the last {-tokens_to_remove} tokens: they have overwritten keys that are inside a "
                "head's window again without them. Call activate_past_recording() before adding tokens that you may "
                "remove, or use a DynamicCache."
            )
        self.length = length
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
        for buffer in self.buffers if self.length > 0 else ():
            buffer.keys, buffer.values = change(buffer.keys), change(buffer.values)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self.buffers[0].read(0, self.length) if self.length > 0 else (None, None)


class GrowingCache(Cache):
    """A cache that keeps every key and copies none to add a token. Every backend can read it.

    `AlibiGPTModel.new_cache` makes one where there is no lossless `WindowedCache`.

    Args:
        layers: The cache of each layer.
        offloading: Whether keys and values are kept on the CPU while other layers compute.
    """

    # No limit. PEFT reads this attribute of every cache except Transformers' dynamic one.
    max_cache_len = -1

    def __init__(self, layers: Sequence[GrowingLayer], offloading: bool = False) -> None:
        super().__init__(layers=[*layers], offloading=offloading)

    def key_norms(self, layer_idx: int) -> Tensor | None:
        """Returns a bound of the norms of all keys of a layer, `[key_value_heads]`, or `None` if it is unknown."""
        layer: Any = self.layers[layer_idx]
        return layer.key_norms
