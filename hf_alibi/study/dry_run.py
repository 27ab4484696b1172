"""What a plan would cost: its runs, the parameters of each model, tokens a step, and estimates of memory and time."""

from typing import Any

import torch

from ..tables import aligned
from .plan import Plan
from .runs import SPEED, Run, settings
from .training import new_config, new_model, parameters

GIB = 2**30
# Bytes for each parameter: weight, gradient and two moments of Adam in float32.
BYTES_A_PARAMETER = 16
# Values kept for the backward pass for each token and layer: about 10 of the width and 2 of the feed-forward layer.
# Logits, their gradient and the probabilities are 3 values for each token and entry of the vocabulary.
WIDTHS, INNER_WIDTHS, LOGITS = 10, 2, 3


def describe(plan: Plan, runs: list[Run]) -> str:
    """Returns a table of `runs`, and below it the totals.

    Memory is what weights, gradients, Adam and activations of one forward pass take; libraries come on top. Time is
    that of training, at the plan's `tokens_per_second`.
    """
    rows = [["run", "parameters", "without embeddings", "tokens a step", "steps", "memory GiB", "minutes"]]
    tokens = 0
    known: dict[str, dict[str, int]] = {}
    for run in runs:
        if run.question == SPEED:
            rows.append([run.name, *["-"] * 6])
            continue
        # Without the choices of the sweep, which change no shape.
        fields = settings(run, plan, {})["config"]
        key = str(sorted(fields.items(), key=str))
        if key not in known:
            with torch.device("meta"):
                known[key] = parameters(new_model(fields))
        count, how = known[key], plan.training
        steps = max(1, run.tokens // how.tokens_per_step)
        tokens += run.tokens
        rows.append(
            [
                run.name,
                f"{count['all'] / 1e6:,.1f}M",
                f"{count['without_embeddings'] / 1e6:,.1f}M",
                f"{how.tokens_per_step:,}",
                f"{steps:,}",
                f"{memory(plan, fields, count['all']) / GIB:,.1f}",
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


def memory(plan: Plan, fields: dict[str, Any], count: int) -> float:
    """Returns an estimate of the bytes that a training step takes."""
    config = new_config(fields)
    tokens = plan.training.tokens_per_step // plan.training.gradient_accumulation_steps
    inner = config.intermediate_size * (3 if config.mlp_gated else INNER_WIDTHS)
    kept = config.num_hidden_layers * (WIDTHS * config.hidden_size + inner)
    # Under autocast activations have 2 bytes, and logits become float32.
    size = 2 if plan.training.bf16 else 4
    return BYTES_A_PARAMETER * count + tokens * (kept * size + LOGITS * config.vocab_size * 4)
