"""What a training run would take, as text: parameters, operations, time, memory, and the KV cache of the model."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from ..tables import aligned
from .gpus import GPU
from .memory import GIB, Memory, Setup, at_batch, cache_bytes, memory_of, trace_of
from .tracing import MemoryTrace, Operations, count_operations, stored_bias_bytes

# Lengths of texts whose cache is reported, in training lengths.
CACHE_LENGTHS = (1, 4, 16)
SECONDS_A_DAY = 86_400
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "communication": "communication",
    "activations": "activations",
    "logits": "logits and loss",
    "total": "most at a time",
}


@dataclass(frozen=True)
class Run:
    """A run on GPUs.

    Attributes:
        setup: Batch, precision, optimizer and sharding.
        gpu: Its speed and memory.
        utilisation: The part of the GPU's peak speed that the operations reach, an assumption.
        tokens: Of the whole run; `None` if unknown.
    """

    setup: Setup
    gpu: GPU
    utilisation: float
    tokens: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, of all ranks."""
        return self.setup.batch * self.setup.length * self.setup.accumulation * self.setup.ranks

    def seconds(self, flops: int) -> float:
        """Returns the time of a step, given the operations of one forward and backward pass."""
        computed = self.setup.autocast or self.setup.dtype
        tflops = self.gpu.tflops_16 if computed.itemsize == 2 else self.gpu.tflops_32
        return flops * self.setup.accumulation / (tflops * 1e12 * self.utilisation)


def report(config: PreTrainedConfig, run: Run) -> str:
    """Returns the whole report."""
    operations = count_operations(
        config, run.setup.batch, run.setup.length, gradient_checkpointing=run.setup.checkpointing
    )
    parts = [_memory(config, run), _operations(operations, run), _cache(config, run.setup)]
    return "\n\n".join([_heading(config, run), *parts])


def _heading(config: PreTrainedConfig, run: Run) -> str:
    setup, gpu = run.setup, run.gpu
    precision = str(setup.dtype).removeprefix("torch.")
    if setup.autocast is not None:
        precision += f" with {str(setup.autocast).removeprefix('torch.')} autocast"
    return "\n".join(
        [
            f"{config.model_type}: {config.num_hidden_layers} layers, width {config.hidden_size:,}, "
            f"{config.num_attention_heads} heads, {config.vocab_size:,} tokens in the vocabulary",
            f"{setup.ranks} x {gpu.name}: {gpu.tflops_16:g} TFLOPS in 16 bits, {gpu.tflops_32:g} in float32, "
            f"{gpu.memory_gb:g} GB ({gpu.source})",
            f"{setup.batch} x {setup.length:,} tokens in a forward pass of a rank, {run.tokens_per_step:,} in a step; "
            f"{precision}, {setup.optimizer}, sharding stage {setup.stage}",
        ]
    )


def _memory(config: PreTrainedConfig, run: Run) -> str:
    """Returns a table with a column without and one with gradient checkpointing."""
    columns = []
    counts = ""
    room = run.gpu.memory_gb * 1e9
    for checkpointing in (False, True):
        setup = replace(run.setup, checkpointing=checkpointing)
        one, two = (trace_of(config, replace(setup, batch=batch)) for batch in (setup.batch, 2 * setup.batch))
        counts = f"{one.parameters / 1e6:,.1f}M parameters, {one.without_embeddings / 1e6:,.1f}M without embeddings"
        memory = memory_of(one, setup)

        columns.append(
            [*_gib(memory), "yes" if memory.total <= room else "no", f"{_largest(one, two, setup, room):,}"]
        )
    names = [*PARTS.values(), f"fits in {room / GIB:.1f}", "largest batch"]
    rows = [["GiB a rank", "plain", "checkpointing"]]
    rows += [list(row) for row in zip(names, *columns, strict=True)]
    size = (run.setup.autocast or run.setup.dtype).itemsize
    bias, shared = stored_bias_bytes(config, run.setup.length, torch.float16 if size == 2 else torch.float32)
    of_what = "for all layers" if shared else "a layer, with checkpointing of one layer at a time"
    return "\n".join(
        [
            counts,
            "",
            aligned(rows, left=[0]),
            f"sdpa on a GPU keeps its bias too: {bias / GIB:,.2f} GiB {of_what}",
        ]
    )


def _gib(memory: Memory) -> list[str]:
    return [f"{getattr(memory, part) / GIB:,.2f}" for part in PARTS]


def _largest(one: MemoryTrace, two: MemoryTrace, setup: Setup, room: float) -> int:
    """Returns the largest batch that fits, 0 for none.

    Args:
        one: The trace of the batch of `setup`.
        two: That of twice the batch.
        setup: The run.
        room: Bytes of the GPU.
    """

    def fits(batch: int) -> bool:
        return memory_of(at_batch(one, two, batch / setup.batch), setup).total <= room

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _operations(operations: Operations, run: Run) -> str:
    """Returns a table with a line for attention to all keys, and one for head windows if they are known."""
    tokens = run.setup.batch * run.setup.length
    rows = [
        ["attention to", "GFLOPs a token, forward", "training", "seconds a step", "tokens a second", "tokens a day"]
    ]
    if run.tokens is not None:
        rows[0].append("days")
    counted = {"all keys": (operations.forward, operations.both)}
    if operations.both_in_windows < operations.both:
        # Where attention leaves out the others: `sdpa` on the CPU, `flex_attention` on a GPU.
        counted["keys in head windows"] = (operations.forward_in_windows, operations.both_in_windows)
    for name, (forward, both) in counted.items():
        seconds = run.seconds(both)
        speed = run.tokens_per_step / seconds
        row = [name, f"{forward / tokens / 1e9:.4g}", f"{both / tokens / 1e9:.4g}", f"{seconds:,.3f}"]
        row += [f"{speed:,.0f}", f"{speed * SECONDS_A_DAY / 1e9:,.3g}G"]
        if run.tokens is not None:
            row.append(f"{run.tokens / speed / SECONDS_A_DAY:,.2f}")
        rows.append(row)
    again = ", with layers computed again" if run.setup.checkpointing else ""
    return "\n".join(
        [
            aligned(rows, left=[0]),
            f"at {run.utilisation:.0%} of the GPU's peak, an assumption; training counts forward and backward{again}",
        ]
    )


def _cache(config: PreTrainedConfig, setup: Setup) -> str:
    dtype = setup.autocast or setup.dtype
    rows = [["KV cache of one text, tokens", "all keys, GiB", "head windows, GiB"]]
    for times in CACHE_LENGTHS:
        whole, kept = cache_bytes(config, times * setup.length, dtype)
        rows.append(
            [
                f"{times * setup.length:,}",
                f"{whole / GIB:,.3f}",
                "-" if kept is None else f"{kept / GIB:,.3f}",
            ]
        )
    return aligned(rows, left=[0])
