"""Models and ways to read a text for the tests of both caches: windowed and growing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_alibi import AlibiGPTForCausalLM

LENGTH = 150
# Windows of 6 to 110 keys, so that even a short text is longer.
STEEP = [4.0, 2.0, 1.0, 0.5]
SHAPES: dict[str, dict[str, Any]] = {
    "4-heads": {"num_attention_heads": 4, "alibi_slopes": STEEP},
    "6-heads-unsorted": {"num_attention_heads": 6, "alibi_slopes": [*STEEP, 3.0, 0.7]},
    "12-heads-grouped": {"num_attention_heads": 12, "num_key_value_heads": 4, "alibi_slopes": STEEP * 3},
    "multi-query": {"num_attention_heads": 4, "num_key_value_heads": 1, "alibi_slopes": STEEP},
    "trainable": {"num_attention_heads": 4, "alibi_slopes": STEEP, "alibi_slopes_trainable": True},
}
STEPS = {
    "token by token": [1] * LENGTH,
    "prompt, then tokens": [100] + [1] * 50,
    "chunks": [70, 1, 4, 3, 70, 1, 1],
    "a few at a time": [5] * 30,
}
each_step = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_steps(
    model: AlibiGPTForCausalLM,
    input_ids: Tensor,
    steps: list[int],
    past: Any,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Returns the logits of a text that is read in steps of these sizes into the cache `past`."""
    logits, done = [], past.get_seq_length()
    for step in steps:
        part = slice(done, done + step)
        of_step = {name: value[:, part] for name, value in kwargs.items()}
        seen = None if mask is None else mask[:, : part.stop]
        logits.append(model(input_ids[:, part], attention_mask=seen, past_key_values=past, **of_step).logits)
        done = part.stop
    return torch.cat(logits, 1)
