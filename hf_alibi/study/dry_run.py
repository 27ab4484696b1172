"""What a plan would cost: its runs, the parameters of each model, tokens a step, and estimates of memory and time."""

from typing import Any

import torch

from ..planning.memory import GIB, Setup, memory_of, trace_of
from ..planning.tracing import MemoryTrace
from ..tables import aligned
from .plan import Plan
from .runs import SPEED, Run, settings
from .training import new_config


def describe(plan: Plan, runs: list[Run]) -> str:
    """Returns a table of `runs`, and below it the totals.

    Memory is the most that weights, gradients, Adam and activations take at a time; libraries come on top. Time is
    that of training, at the plan's `tokens_per_second`.
    """
    rows = [["run", "parameters", "without embeddings", "tokens a step", "steps", "memory GiB", "minutes"]]
    tokens = 0
    known: dict[str, tuple[MemoryTrace, float]] = {}
    for run in runs:
        if run.question == SPEED:
            rows.append([run.name, *["-"] * 6])
            continue
        # Without the choices of the sweep, which change no shape.
        fields = settings(run, plan, {})["config"]
        key = str(sorted(fields.items(), key=str))
        if key not in known:
            known[key] = _memory(plan, fields, run.training_length)
        (trace, needed), how = known[key], plan.training
        steps = max(1, run.tokens // how.tokens_per_step)
        tokens += run.tokens
        rows.append(
            [
                run.name,
                f"{trace.parameters / 1e6:,.1f}M",
                f"{trace.without_embeddings / 1e6:,.1f}M",
                f"{how.tokens_per_step:,}",
                f"{steps:,}",
                f"{needed / GIB:,.1f}",
                f"{run.tokens / how.tokens_per_second / 60:,.1f}",
            ]
        )
    hours = tokens / plan.training.tokens_per_second / 3600
    return "\n".join(
        [
            aligned(rows, left=[0]),
            f"{len(runs)} runs, {tokens:,} training tokens: {hours:,.1f} hours at the plan's "
            f"{plan.training.tokens_per_second:,.0f} tokens a second, and about a third more for tests",
        ]
    )


def _memory(plan: Plan, fields: dict[str, Any], length: int) -> tuple[MemoryTrace, float]:
    """Returns the trace of a forward and backward pass, and the bytes that training takes."""
    accumulation = plan.training.gradient_accumulation_steps
    setup = Setup(
        batch=plan.training.tokens_per_step // accumulation // length,
        length=length,
        accumulation=accumulation,
        autocast=torch.bfloat16 if plan.training.bf16 else None,
    )
    trace = trace_of(new_config(fields), setup)
    return trace, memory_of(trace, setup).total
