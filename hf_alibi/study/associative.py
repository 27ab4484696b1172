"""The associative-recall task, trained with the text: pairs of random tokens, and later the keys again.

A row of text gets `pairs` pairs k₁ v₁ k₂ v₂ … at one place, and later the same pairs in another order. Where they
stand, the text is overwritten. Keys and values are random tokens, so only the value after a repeated key can be
predicted: the loss ignores the other ones. Compare Arora et al., "Zoology" (arXiv 2312.04927).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .testing import unreadable

# Keys are drawn from the lower half of these tokens, values from the upper half. Every byte-level vocabulary has them.
FIRST_TOKEN, LAST_TOKEN = 2, 258


def with_pairs(row: Tensor, pairs: int, random: np.random.Generator, distance: int | None = None) -> dict[str, Tensor]:
    """Writes the pairs into a row of text.

    Args:
        row: `[length]`, text. It needs at least `4 * pairs` tokens.
        pairs: Pairs of a key and a value.
        random: Draws tokens and places.
        distance: Tokens from the beginning of the pairs to that of the repetition, which is then at the end of the
            row; None to draw both places.

    Returns:
        `input_ids` and `labels`, `[length]`. Labels are -100 at the pairs, except at the values after repeated keys.
    """
    size = 2 * pairs
    if distance is None:
        first, second = sorted(random.choice(len(row) - 2 * size + 1, 2, replace=True))
        second += size
    else:
        second = len(row) - size
        first = second - distance
    half = (FIRST_TOKEN + LAST_TOKEN) // 2
    keys = random.choice(np.arange(FIRST_TOKEN, half), pairs, replace=False)
    values = random.choice(np.arange(half, LAST_TOKEN), pairs, replace=False)
    listed = torch.from_numpy(np.stack([keys, values], 1))  # [pairs, 2]
    asked = listed[torch.from_numpy(random.permutation(pairs))]
    input_ids, labels = row.clone(), row.clone()
    input_ids[first : first + size] = listed.flatten()
    input_ids[second : second + size] = asked.flatten()
    labels[first : first + size] = -100
    labels[second : second + size : 2] = -100
    labels[second + 1 : second + size : 2] = asked[:, 1]
    return {"input_ids": input_ids, "labels": labels}


@torch.no_grad()
def associative_recall(
    model: PreTrainedModel, text: Tensor, pairs: int, distances: list[int], rows: int, per_forward: int
) -> dict[str, Any]:
    """Returns loss and accuracy of the values after repeated keys, by distance; or why there are none.

    Args:
        model: In evaluation mode.
        text: `[tokens]`, from which the rows around the pairs are taken.
        pairs: Pairs of a row.
        distances: Tokens from the beginning of the pairs to that of the repetition.
        rows: Rows at each distance.
        per_forward: Most tokens of a forward pass.
    """
    found: dict[str, Any] = {}
    for distance in distances:
        if reason := unreadable(model, distance + 2 * pairs):
            found[str(distance)] = reason
            continue
        random = np.random.default_rng([distance, pairs])
        length = distance + 2 * pairs
        starts = random.integers(0, len(text) - length, rows)
        made = [with_pairs(text[start : start + length], pairs, random, distance=distance) for start in starts]
        inputs = torch.stack([row["input_ids"] for row in made])
        answers = torch.arange(length - 2 * pairs + 1, length, 2)
        losses, hits = [], []
        for part in inputs.split(max(1, per_forward // length)):
            part = part.to(model.device)
            logits = model(input_ids=part, use_cache=False).logits[:, answers - 1].float()
            targets = part[:, answers]
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
            hits.append((logits.argmax(-1) == targets).float())
        found[str(distance)] = {
            "nats": torch.cat(losses).mean().item(),
            "accuracy": torch.cat(hits).mean().item(),
            "values": rows * pairs,
        }
    return found
