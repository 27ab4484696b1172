"""The memory of one rank in training, from a trace of a step and from how the run is set up."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ..model.cache import WindowedLayer
from .tracing import MemoryTrace, trace_memory

MIB, GIB = 2**20, 2**30

# Bytes of the optimizer for each parameter; `None` for two numbers in the dtype of the weights, Adam's moments.
OPTIMIZERS: dict[str, float | None] = {"adamw_torch_fused": None, "adamw_bnb_8bit": 2, "sgd": 0}
# FSDP and ZeRO-3 gather a layer while another one computes.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Setup:
    """How a run is set up.

    Attributes:
        batch: Texts in a forward pass of one rank.
        length: Tokens in a text.
        ranks: GPUs.
        accumulation: Forward passes of a step.
        checkpointing: Whether layers are computed again in the backward pass.
        dtype: Of the weights.
        autocast: Dtype of mixed precision; `None` for none.
        optimizer: A key of `OPTIMIZERS`, names of `--optim` in Trainer.
        stage: What the ranks share: 0 nothing (DDP), 1 the optimizer (ZeRO-1), 2 gradients too (ZeRO-2, FSDP's
            SHARD_GRAD_OP), 3 weights too (ZeRO-3, FSDP's FULL_SHARD).
    """

    batch: int
    length: int
    ranks: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    optimizer: str = "adamw_torch_fused"
    stage: int = 0


class Memory(NamedTuple):
    """Bytes of one rank. `total` is the most at a time, which is less than the sum: parts do not peak together.

    Attributes:
        weights: Parameters that stay. With stage 3, layers that are gathered for a while come on top.
        gradients: When all are finished.
        optimizer: Its state.
        communication: Buffers of DDP, or gathered layers with stage 3.
        activations: What the decoder keeps for the backward pass.
        logits: Logits, loss, and their gradients.
        total: The most at a time.
    """

    weights: float
    gradients: float
    optimizer: float
    communication: float
    activations: float
    logits: float
    total: float


def trace_of(config: PreTrainedConfig, setup: Setup) -> MemoryTrace:
    """Returns the trace of a step. With stage 3, the gathered weights have the dtype of the computation."""
    dtype = setup.autocast if setup.autocast is not None and setup.stage == 3 else setup.dtype
    return trace_memory(
        config,
        setup.batch,
        setup.length,
        dtype=dtype,
        autocast=setup.autocast,
        gradient_checkpointing=setup.checkpointing,
    )


def memory_of(trace: MemoryTrace, setup: Setup) -> Memory:
    """Returns the memory of a rank. `trace` is that of `setup`."""
    size, ranks = setup.dtype.itemsize, setup.ranks
    whole = trace.parameters * size
    shared = {
        part: ranks if setup.stage >= stage else 1 for stage, part in enumerate(("optimizer", "grad", "weight"), 1)
    }
    state = OPTIMIZERS[setup.optimizer]
    optimizer = trace.parameters * (2 * size if state is None else state) / shared["optimizer"]
    weights, gradients = whole / shared["weight"], whole / shared["grad"]
    communication = 0.0
    if ranks > 1 and setup.stage == 0:
        # DDP copies gradients into buckets.
        communication = whole
    elif setup.stage == 3:
        communication = GATHERED_LAYERS * trace.largest_layer * (setup.autocast or setup.dtype).itemsize
    in_passes = trace.peak(gradients / trace.gradient_bytes, kept_gradients=setup.accumulation > 1)
    total = weights + optimizer + communication + max(in_passes, gradients)
    return Memory(weights, gradients, optimizer, communication, trace.decoder_bytes, trace.logits_bytes, total)


def at_batch(small: MemoryTrace, large: MemoryTrace, factor: float) -> MemoryTrace:
    """Returns the trace of `factor` times the batch of `small`. `large` is that of twice the batch.

    Every part of a trace is linear in the batch.
    """

    def scaled(first: int, second: int) -> int:
        return round(first + (second - first) * (factor - 1))

    pairs = zip(small.timeline, large.timeline, strict=True)
    return MemoryTrace(
        small.parameters,
        small.without_embeddings,
        small.largest_layer,
        scaled(small.decoder_bytes, large.decoder_bytes),
        small.gradient_bytes,
        tuple((finished, scaled(one, two)) for (finished, one), (_, two) in pairs),
    )


def cache_bytes(config: PreTrainedConfig, length: int, dtype: torch.dtype) -> tuple[int, int | None]:
    """Returns the bytes of the KV cache of one text: with all keys, and within the head windows of a new model.

    The second is `None` if the windows do not follow from the weights.
    """
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    states = torch.empty(shape, dtype=dtype, device="meta")
    whole = 2 * config.num_hidden_layers * states.nbytes
    guarantee = config.window_guarantee() if config.model_type == "alibi_gpt" else None
    if guarantee is None:
        return whole, None
    layer = WindowedLayer(guarantee.windows, torch.tensor(guarantee.slopes))
    layer.update(states, states)
    held = sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in layer.buffers)
    return whole, config.num_hidden_layers * held


def status_mib(key: str) -> float:
    """Returns an entry of `/proc/self/status` in MiB: `VmRSS`, or `VmHWM`, the largest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / MIB


def peak_mib() -> float:
    """Returns the most memory in MiB that this process has held: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    # That of getrusage would include the memory of the process that started this one.
    return status_mib("VmHWM")
