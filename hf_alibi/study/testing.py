"""Tests a trained model: loss by length and position with both protocols, copies by distance, windows, interpolation.

Losses are means in nats per token. `evaluation/perplexity.py` explains the protocols. A text is made of pieces of
twice the longest length, each of one document if documents are long (`text.py`). The targets of the sliding windows
are in the second half of each piece, so that every one has its whole context at every length. The same targets are
also scored with non-overlapping windows (`same_targets`). `sliding_starts` spreads them over the places in those.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.perplexity import bits_per_byte, mean_by_doubling, nats_by_position, token_nats
from ..training.watching import kept_fraction, window_record

# Tokens of a segment that is repeated.
SEGMENT = 32
UNREADABLE = "the model has no positions beyond {limit} tokens"


def unreadable(model: PreTrainedModel, length: int) -> dict[str, Any] | None:
    """Returns why a model cannot read texts of this length, such as one with a learned table; None if it can."""
    limit = model.config.max_position_embeddings
    return {"unreadable": UNREADABLE.format(limit=limit)} if length > limit else None


def by_length(
    model: PreTrainedModel, ids: Tensor, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Returns the loss at each test length, or why there is none.

    Args:
        model: In evaluation mode.
        ids: `[tokens]`, the text.
        settings: Of the run.
        tokenizer: For the bits per byte.
    """
    how, results = settings["test"], dict[str, dict[str, Any]]()
    ids = ids[: how["tokens"] + 1]
    stride, starts = how["stride"], sliding_starts(how)
    for length in settings["test_lengths"]:
        if reason := unreadable(model, length):
            results[str(length)] = reason
            continue
        start = time.perf_counter()
        nats = token_nats(model, ids, length, tokens_per_forward=how["tokens_per_forward"])
        seconds = time.perf_counter() - start
        slid, same = [], []
        for first in starts:
            # One window, which ends with the targets.
            end = first + stride
            window = ids[end - length : end + 1]
            slid.append(token_nats(model, window, length, tokens_per_forward=how["tokens_per_forward"])[-stride:])
            same.append(nats[first:end])
        results[str(length)] = {
            "nats": nats.mean().item(),
            "bits_per_byte": bits_per_byte(nats, ids[1:], tokenizer),
            "targets": len(nats),
            "tokens_per_second": round(len(nats) / seconds, 1),
            "by_position": {str(end): loss for end, loss in _doubled(nats, length).items()},
            "same_targets": torch.cat(same).mean().item(),
            "sliding": torch.cat(slid).mean().item(),
            "sliding_targets": sum(map(len, slid)),
        }
    return results


def sliding_starts(how: dict[str, Any]) -> list[int]:
    """Returns where the targets of each sliding window begin.

    The windows of a piece are equally far apart, but for a shift by `stride` from each to the next. So there are
    targets in all parts of non-overlapping windows of every length, not only where these begin.
    """
    longest, stride = max(how["lengths"]), how["stride"]
    pieces = range(longest, how["tokens"], 2 * longest)
    number = how["sliding_targets"] // (stride * len(pieces))
    apart = longest // number
    return [
        middle + window * apart + (piece * number + window) * stride % apart
        for piece, middle in enumerate(pieces)
        for window in range(number)
    ]


def _doubled(nats: Tensor, length: int) -> dict[int, float]:
    return mean_by_doubling(nats_by_position(nats, length).tolist())


def interpolated(model: PreTrainedModel, ids: Tensor, settings: dict[str, Any]) -> dict[str, float]:
    """Returns the loss at each length beyond the training length, with slopes divided by how much longer it is."""
    how, found = settings["test"], {}
    for length in settings["test_lengths"]:
        factor = length / settings["training_length"]
        if factor > 1:
            with _changed(model, alibi_scaling={"type": "linear", "factor": factor}):
                nats = token_nats(
                    model, ids[: how["tokens"] + 1], length, tokens_per_forward=how["tokens_per_forward"]
                )
            found[str(length)] = nats.mean().item()
    return found


def windows_checked(model: PreTrainedModel, ids: Tensor, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns loss and time at the longest length with and without windows, or None where there are no windows.

    On a GPU `sdpa` has none.

    Returns:
        `length`, `nats` and `nats_without`, `largest_difference` of the loss of a token, `seconds` and
        `seconds_without`, and `kept`: the part of all pairs of query and key within the windows.
    """
    record = window_record(model)
    if record is None or not settings["test_lengths"] or model.device.type != "cpu":
        return None
    how, length = settings["test"], max(settings["test_lengths"])
    losses, seconds = [], []
    for tolerance in (model.config.window_tolerance, 0.0):
        with _changed(model, window_tolerance=tolerance):
            start = time.perf_counter()
            losses.append(token_nats(model, ids[: how["tokens"] + 1], length, tokens_per_forward=length))
            seconds.append(time.perf_counter() - start)
    return {
        "length": length,
        "nats": losses[0].mean().item(),
        "nats_without": losses[1].mean().item(),
        "largest_difference": (losses[0] - losses[1]).abs().max().item(),
        "seconds": seconds[0],
        "seconds_without": seconds[1],
        "kept": kept_fraction(record["windows"], length),
    }


@contextmanager
def _changed(model: PreTrainedModel, **values: Any) -> Iterator[None]:
    """Changes fields of the model's config for a while."""
    before = {name: getattr(model.config, name) for name in values}
    for name, value in values.items():
        setattr(model.config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


@torch.no_grad()
def copies(model: PreTrainedModel, ids: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the loss of a segment that occurred before, and of the same segment where it did not, by distance.

    A row is a segment of `SEGMENT` tokens, other text, and the segment again. The control begins with another segment
    and is otherwise the same. The first token of the copy is not scored, as nothing announces it. Rows, and so the
    results of all models, are of the same text.

    Args:
        model: In evaluation mode.
        ids: `[tokens]`, the text.
        settings: Of the run.

    Returns:
        By the tokens from one beginning to the other: `copy` and `control` in nats, and `rows`; or why there is none.
    """
    how, found = settings["test"], {}
    for distance in how["copy_distances"]:
        length = distance + SEGMENT
        if reason := unreadable(model, length):
            found[str(distance)] = reason
            continue
        rows = max(4, how["copy_tokens"] // length)
        between, segment, other = _places(len(ids), distance, rows)
        losses = {}
        for name, first in (("copy", segment), ("control", other)):
            parts = [
                _piece(ids, first, SEGMENT),
                _piece(ids, between, distance - SEGMENT),
                _piece(ids, segment, SEGMENT),
            ]
            losses[name] = _last_nats(model, torch.cat(parts, dim=1), how["tokens_per_forward"]).mean().item()
        found[str(distance)] = losses | {"rows": rows}
    return found


def _places(text: int, distance: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws where the text between, the segment and the other segment of each row begin. None overlaps another.

    Args:
        text: Tokens of the text, at least `distance + SEGMENT`. It is taken as a circle.
        distance: Between the segments.
        rows: Number of rows.
    """
    random = np.random.default_rng(distance)
    between = random.integers(0, text, rows)
    # What the text between leaves has room for both segments, one before the other.
    end = between + distance - SEGMENT
    first, second = np.sort(random.integers(0, text - distance - SEGMENT + 1, (2, rows)), axis=0)
    swapped = random.random(rows) < 0.5
    segment, other = np.where(swapped, second + SEGMENT, first), np.where(swapped, first, second + SEGMENT)
    return between, end + segment, end + other


def _piece(ids: Tensor, starts: np.ndarray, length: int) -> Tensor:
    """Returns the text from each start, `[rows, length]`; the beginning follows the end."""
    return ids[torch.from_numpy(starts[:, None] + np.arange(length)) % len(ids)]


def _last_nats(model: PreTrainedModel, rows: Tensor, per_forward: int) -> Tensor:
    """Returns the losses of the last `SEGMENT - 1` tokens of each row."""
    losses = []
    for part in rows.split(max(1, per_forward // rows.shape[1])):
        part = part.to(model.device)
        logits = model(input_ids=part, use_cache=False, logits_to_keep=SEGMENT).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1 - SEGMENT :], reduction="none"))
    return torch.cat(losses).double()
