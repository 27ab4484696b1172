"""Memory and operations of a training step, from a step without data.

A trace runs the forward and the backward pass of a model with fake tensors, which have shapes and dtypes but no data.
So it takes seconds and little memory for a model of any size. Each tensor that the step makes is counted while it
lives: what the backward pass needs is found from what autograd keeps, not from a formula for one architecture.
Operations are those that PyTorch's FLOP counter counts.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import positions  # noqa: F401  registers its models with the Auto classes
from ..model import causal
from ..model.inputs import QUERY_BLOCK
from ..model.tiles import FEW_KEYS, STORED_BIAS, query_tiles, stored_queries


@dataclass(frozen=True)
class MemoryTrace:
    """The memory that one forward and backward pass takes, on one device.

    Attributes:
        parameters: Number of parameters.
        without_embeddings: The same without the token embedding and an output layer of the same shape.
        largest_layer: Parameters of the largest decoder layer.
        decoder_bytes: Activations that are kept when the decoder has run.
        gradient_bytes: Of all gradients.
        timeline: For each gradient, in the order in which they are finished: the bytes of all gradients finished
            before, and the most that activations, logits and unfinished gradients took meanwhile.
    """

    parameters: int
    without_embeddings: int
    largest_layer: int
    decoder_bytes: int
    gradient_bytes: int
    timeline: tuple[tuple[int, int], ...]

    @property
    def logits_bytes(self) -> int:
        """Bytes of logits, loss and their gradients, beyond what the decoder keeps."""
        return self.timeline[0][1] - self.decoder_bytes

    def peak(self, gradient_share: float = 1, kept_gradients: bool = False) -> float:
        """Returns the bytes beyond weights and optimizer at the worst moment of the two passes.

        Args:
            gradient_share: The part of every finished gradient that stays on this device.
            kept_gradients: Whether the gradients of an earlier pass are there from the start.
        """
        if kept_gradients:
            return self.gradient_bytes * gradient_share + max(others for _, others in self.timeline)
        return max(finished * gradient_share + others for finished, others in self.timeline)


@dataclass(frozen=True)
class Operations:
    """The floating-point operations of one forward and backward pass.

    Attributes:
        forward: Of the forward pass.
        both: Of both passes. Layers that are computed again for gradient checkpointing count twice.
        forward_in_windows: As `forward`, without the keys beyond the head windows of a new model. It is equal to
            `forward` if windows are unknown.
        both_in_windows: As `both`, in windows.
    """

    forward: int
    both: int
    forward_in_windows: int
    both_in_windows: int


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.add(result)
        return results

    def add(self, states: Tensor) -> None:
        storage = states.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            weakref.finalize(storage, self._free, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def leave_out(self, states: Tensor) -> None:
        """Does not count a tensor that exists already."""
        self._known[states.untyped_storage()] = 0

    def take_peak(self) -> int:
        """Returns the peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _free(self, size: int) -> None:
        self.live -= size


def trace_memory(
    config: PreTrainedConfig,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
) -> MemoryTrace:
    """Returns the memory of a training step.

    The attention is the model's own operator, which keeps queries, keys, values and output for the backward pass, and
    no matrix of scores or biases. The same holds for the flash kernels and FlexAttention on a GPU.

    Args:
        config: Of a causal language model.
        batch: Texts in the batch.
        length: Tokens in a text.
        dtype: Of the weights.
        autocast: Dtype of mixed precision; `None` for none.
        gradient_checkpointing: Whether layers keep their inputs only, and are computed again in the backward pass.
    """
    with _fake_model(config, dtype, gradient_checkpointing) as model:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        memory = _LiveMemory()
        for weight in (*model.parameters(), *model.buffers()):
            memory.leave_out(weight)
        timeline: list[tuple[int, int]] = []
        with _finished_gradients(model, memory, timeline), memory:
            decoder_bytes, loss = _forward(model, batch, length, autocast, memory)
            loss.backward()
        counts = parameters(model)
        return MemoryTrace(
            parameters=counts["all"],
            without_embeddings=counts["without_embeddings"],
            largest_layer=max((sum(map(Tensor.numel, layer.parameters())) for layer in layers), default=0),
            decoder_bytes=decoder_bytes,
            gradient_bytes=timeline[-1][0],
            timeline=tuple(timeline),
        )


def count_operations(
    config: PreTrainedConfig, batch: int, length: int, *, gradient_checkpointing: bool = False
) -> Operations:
    """Returns the operations of a training step. The arguments are those of `trace_memory`.

    They do not depend on dtypes. Memory has a trace of its own, because PyTorch's counter keeps tensors of layers that
    are computed again.
    """
    part = _fractions_in_windows(config, batch, length)
    with (
        _fake_model(config, torch.float32, gradient_checkpointing) as model,
        FlopCounterMode(display=False) as counter,
    ):
        _, loss = _forward(model, batch, length, None)
        forward = dict(counter.get_flop_counts()["Global"])
        loss.backward()
        both = dict(counter.get_flop_counts()["Global"])
    return Operations(sum(forward.values()), sum(both.values()), _in_windows(forward, part), _in_windows(both, part))


@contextmanager
def _fake_model(config: PreTrainedConfig, dtype: torch.dtype, gradient_checkpointing: bool) -> Iterator[Any]:
    """Yields a model without data, in training mode, in a context where all new tensors have none."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if gradient_checkpointing:
            checkpoint_layers(model)
        yield model


def checkpoint_layers(model: Any) -> None:
    """Lets the layers keep their inputs only, under the name that this Transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Returns the number of parameters, with and without those of the token embedding."""
    total = sum(weight.numel() for weight in model.parameters())
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    # Tied ones are counted once.
    embeddings = {id(layer.weight): layer.weight.numel() for layer in layers}
    return {"all": total, "without_embeddings": total - sum(embeddings.values())}


@contextmanager
def _finished_gradients(
    model: PreTrainedModel, memory: _LiveMemory, timeline: list[tuple[int, int]]
) -> Iterator[None]:
    """Removes each gradient when it is finished, and notes it, so that `memory` counts everything else."""
    finished = 0

    def take(weight: Tensor) -> None:
        nonlocal finished
        timeline.append((finished, memory.take_peak()))
        finished += weight.numel() * weight.itemsize
        weight.grad = None

    handles = [weight.register_post_accumulate_grad_hook(take) for weight in model.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    timeline.append((finished, memory.take_peak()))


def _forward(
    model: PreTrainedModel, batch: int, length: int, autocast: torch.dtype | None, memory: _LiveMemory | None = None
) -> tuple[int, Tensor]:
    """Returns the bytes that are kept when the decoder has run, and the loss.

    Under mixed precision the outputs become float32 copies, as Accelerate makes them.
    """
    after_decoder = 0

    def note(*_: Any) -> None:
        nonlocal after_decoder
        after_decoder = memory.live if memory else 0

    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(note)
    ids = torch.zeros(batch, length, dtype=torch.long)
    precision: Any = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with precision:
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
    handle.remove()
    if autocast is not None:
        outputs.logits = outputs.logits.float()
    return after_decoder, outputs.loss


def _operators() -> tuple[Any, Any]:
    """Returns the operators of causal attention, forward and backward."""
    operators = getattr(torch.ops, causal.NAMESPACE)
    return operators.attention_in_tiles, operators.attention_in_tiles_backward


def _fractions_in_windows(config: PreTrainedConfig, batch: int, length: int) -> dict[Any, tuple[int, int]]:
    """Returns for each operator of attention its operations with and without the windows of a new model.

    The result is empty if windows are unknown, or too few tokens make them useless.
    """
    guarantee = config.window_guarantee() if config.model_type == "alibi_gpt" else None
    if guarantee is None or length <= FEW_KEYS or length < QUERY_BLOCK:
        return {}
    forward, backward = _operators()
    query = torch.empty(batch, config.num_attention_heads, length, config.head_dim, device="meta")
    key = query[:, : config.num_key_value_heads]
    slopes = torch.empty(config.num_attention_heads)
    results = {}
    for operator in (forward, backward):
        counts = []
        for windows in (torch.tensor(guarantee.windows), None):
            inputs = query, key, key, slopes, windows
            if operator is forward:
                counts.append(flop_registry[operator](*inputs, 1.0))
            else:
                counts.append(flop_registry[operator](query, *inputs, query, None, 1.0, config.alibi_slopes_trainable))
        results[operator] = (counts[0], counts[1])
    return results


def _in_windows(counts: dict[Any, int], part: dict[Any, tuple[int, int]]) -> int:
    total = 0
    for operator, count in counts.items():
        kept, whole = part.get(operator, (1, 1))
        total += count * kept // whole
    return total


def stored_bias_bytes(config: PreTrainedConfig, length: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Returns the bytes of the bias that `sdpa` keeps for the backward pass on a GPU, and whether layers share them.

    Otherwise they are those of one layer.
    """
    heads = config.num_attention_heads
    if heads * length**2 <= STORED_BIAS and not config.alibi_slopes_trainable:
        return heads * length**2 * dtype.itemsize, True
    query = torch.empty(1, heads, length, config.head_dim, device="meta")
    tiles = query_tiles(query, query, None, stored_queries(query, query))
    scores = sum(tile.blocks * tile.num_queries * tile.num_keys for tile in tiles)
    return heads * scores * dtype.itemsize, False
