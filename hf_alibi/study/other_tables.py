"""Tables about everything but length: recall, speed, ablations, windows, and where the runs were made."""

from collections.abc import Sequence
from typing import Any

from ..tables import markdown
from .records import (
    PAPER,
    SOURCE,
    Record,
    by_distance,
    cell,
    final_loss,
    grouped,
    label,
    lengths_of,
    of,
    over_seeds,
    texts_of,
)
from .runs import ABLATIONS, MAIN, RECALL, SPEED, SWEEP, WINDOWS
from .testing import SEGMENT


def recall(records: Sequence[Record]) -> str:
    """How much a copy saves by distance, and the associative-recall task."""
    main = of(records, MAIN)
    parts = [_distances(main, lambda record: record["copies"], _saved, "+.2f")]
    parts[0] = parts[0] and (
        f"A segment of {SEGMENT} tokens occurs again after some tokens (from beginning to beginning). The table has "
        "the nats per token that the copy saves, against the same text in which the first segment is another one.\n\n"
        + parts[0]
    )
    task = _distances(of(records, RECALL), lambda record: record["recall"], lambda found: found.get("accuracy"), ".2f")
    if task:
        pairs = of(records, RECALL)[0]["settings"]["recall"]["pairs"]
        parts.append(
            f"Associative recall, trained with the text: {pairs} pairs of random tokens, and the keys again after "
            "some tokens. The table has the part of the values that the model predicts.\n\n" + task
        )
    found = [part for part in parts if part]
    return "## Recall by distance\n\n" + "\n\n".join(found) if found else ""


def _saved(found: dict[str, Any]) -> float | None:
    return found["control"] - found["copy"] if "copy" in found else None


def _distances(records: Sequence[Record], read: Any, value: Any, form: str) -> str:
    distances = by_distance(records, read)
    if not distances:
        return ""
    rows = []
    for (variant, length), group in grouped(records).items():
        cells = []
        for distance in distances:
            found = [read(record).get(str(distance), {}) for record in group]
            unreadable = any("unreadable" in one for one in found)
            cells.append("cannot read it" if unreadable else over_seeds(map(value, found), form))
        rows.append([label(variant), f"{length:,}", *cells])
    return markdown(["method", "trained at", *(f"{distance:,}" for distance in distances)], rows)


def speed(records: Sequence[Record]) -> str:
    """Time and memory of training steps and inference."""
    parts = []
    for record in of(records, SPEED):
        rows = []
        for line in record["speed"]:
            measured = line["reason"] is None
            rows.append(
                [
                    line["task"],
                    f"{line['length']:,}",
                    label(line["implementation"]),
                    f"{1000 * line['tokens'] / line['milliseconds']:,.0f}" if measured else line["reason"],
                    f"{line['ratio']:.2f}" if line["ratio"] else "–",
                    f"{line['peak_mib']:,.0f}" if line["peak_mib"] else "–",
                ]
            )
        head = ["task", "length", "method", "tokens/s", "time over sinusoidal", "peak MiB"]
        parts.append(markdown(head, rows))
    if not parts:
        return ""
    paper = []
    for length, methods in PAPER["speed_one_v100_words_per_second"].items():
        base = methods["sinusoidal"]
        for name, figures in methods.items():
            paper.append(
                [
                    length,
                    name,
                    f"{base['train'] / figures['train']:.2f}",
                    f"{base['eval'] / figures['eval']:.2f}",
                    f"{figures['train_gb'] / base['train_gb']:.2f}",
                ]
            )
    head = ["length", "method", "training", "inference", "memory of training"]
    return (
        "## Speed and memory\n\nMedians over rounds in which all methods take turns; memory beyond that of the "
        "weights and libraries. Training is forward and backward pass of a step's tokens, inference one text.\n\n"
        + "\n\n".join(parts)
        + f"\n\nThe paper, on one V100 ({SOURCE}): time and memory over those of the sinusoidal model.\n\n"
        + markdown(head, paper)
    )


def ablations(records: Sequence[Record]) -> str:
    """Variants of ALiBi at each length."""
    chosen = of(records, ABLATIONS)
    usual = _losses_of_the_usual_model(records)
    parts = []
    for text in texts_of(chosen):
        lengths = lengths_of(chosen, text)
        rows = [
            [
                variant,
                label(group[0]["settings"]["method"]),
                str(len(group)),
                over_seeds(map(final_loss, group), ".3f"),
                over_seeds(_differences(group, usual), "+.3f"),
                over_seeds(map(_largest_bound, group), ".1f"),
                *(cell(group, text, length) for length in lengths),
            ]
            for (variant, _), group in grouped(chosen).items()
        ]
        head = ["variant", "method", "seeds", "held-out loss", "difference", "largest U"]
        head += [f"{length:,}" for length in lengths]
        parts.append(f"On {text}:\n\n" + markdown(head, rows))
    if not parts:
        return ""
    tokens, length = chosen[0]["training"]["tokens"], chosen[0]["settings"]["training_length"]
    return (
        f"## Ablations\n\nEach trained on {tokens:,} tokens at {length:,}. Perplexity with non-overlapping windows by "
        "length. The difference is the loss minus that of the comparison's model with the same seed. U is the bound "
        "on scores in nats at the end, of the layer where it is largest.\n\n" + "\n\n".join(parts)
    )


def _losses_of_the_usual_model(records: Sequence[Record]) -> dict[int, float]:
    """Returns the loss by seed of the ablation whose model is ALiBi's of the main comparison."""
    usual = [record["settings"]["config"] for record in of(records, MAIN) if record["settings"]["method"] == "alibi"]
    return {
        record["settings"]["seed"]: final_loss(record)
        for record in of(records, ABLATIONS)
        if record["settings"]["method"] == "alibi" and record["settings"]["config"] in usual
    }


def _differences(group: Sequence[Record], usual: dict[int, float]) -> list[float]:
    """Returns the loss of each seed without that of the usual model with the same seed."""
    pairs = [(final_loss(record), usual.get(record["settings"]["seed"])) for record in group]
    return [loss - other for loss, other in pairs if other is not None]


def _largest_bound(record: Record) -> float | None:
    """Returns the largest U of all layers after the last step, or None without QK-norm."""
    points = record["training"]["windows"]
    return max(points[-1]["score_bound"]) if points else None


def windows(records: Sequence[Record]) -> str:
    """U and windows along training, and whether windows change the loss."""
    watched = [record for record in of(records, WINDOWS) if record["training"]["windows"]]
    parts = []
    for record in watched:
        settings = record["settings"]
        rows = [
            [
                f"{point['step']:,}",
                ", ".join(f"{bound:.1f}" for bound in point["score_bound"]),
                ", ".join(f"{largest:.2f}" for largest, _ in point["query_gain"]),
                ", ".join(f"{largest:.2f}" for largest, _ in point["key_gain"]),
                ", ".join(f"{keys:,}" for keys in point["keys"]),
            ]
            for point in record["training"]["windows"]
        ]
        head = ["step", "U in nats, by layer", "largest query gain", "largest key gain", "keys a query looks at"]
        parts.append(f"{settings['variant']}, seed {settings['seed']}, along training:\n\n" + markdown(head, rows))
    tested = {name: [one for one in of(records, name) if _has_windows(one)] for name in (MAIN, WINDOWS, ABLATIONS)}
    rows = []
    for (variant, length), group in (pair for some in tested.values() for pair in grouped(some).items()):
        checked = [record["windows"] for record in group]
        rows.append(
            [
                label(variant),
                f"{group[0]['training']['steps']:,}",
                f"{length:,}",
                f"{checked[0]['length']:,}",
                over_seeds((found["nats"] for found in checked), ".6f"),
                over_seeds((found["nats_without"] for found in checked), ".6f"),
                f"{max(found['largest_difference'] for found in checked):.1e}",
                over_seeds((100 * found["kept"] for found in checked), ".1f") + "%",
                over_seeds((found["seconds_without"] / found["seconds"] for found in checked), ".2f"),
            ]
        )
    if not rows:
        return ""
    head = [
        "variant",
        "steps",
        "trained at",
        "length",
        "loss with",
        "loss without",
        "largest difference",
        "kept",
        "speed-up",
    ]
    return (
        "## Head windows in trained models\n\nLoss in nats per token with and without windows at the longest length, "
        "the largest difference at any token, the part of all pairs of query and key within the windows that the "
        "gains guarantee, and how much faster the windows read the text. Only runs on a CPU are here: on a GPU `sdpa` "
        "has no windows.\n\n" + markdown(head, rows) + "".join(f"\n\n{part}" for part in parts)
    )


def _has_windows(record: Record) -> bool:
    """Whether a run has compared its loss with and without windows."""
    return record["windows"] is not None and record["environment"]["gpu"] is None


def sweep(records: Sequence[Record]) -> str:
    """Every run of the sweep."""
    tried = of(records, SWEEP)
    if not tried:
        return ""
    rows = []
    for record in sorted(tried, key=lambda one: (one["settings"]["method"], final_loss(one) or float("inf"))):
        name, loss = record["settings"]["name"].removeprefix("sweep-"), final_loss(record)
        rows.append([name, "diverged" if loss is None else f"{loss:.4f}"])
    return (
        f"## The sweep\n\nHeld-out loss after {tried[0]['training']['tokens']:,} tokens at the shortest training "
        "length. The lowest of each method is used everywhere else.\n\n" + markdown(["run", "loss"], rows)
    )


def machines(records: Sequence[Record]) -> str:
    """Where the runs were made, and with which versions."""
    keys = ("cpu", "cores", "threads", "gpu", "hf_alibi", "torch", "transformers", "python")
    counts: dict[tuple[str, ...], int] = {}
    for record in records:
        row = tuple("–" if record["environment"][key] is None else str(record["environment"][key]) for key in keys)
        counts[row] = counts.get(row, 0) + 1
    rows = [[*row, str(count)] for row, count in sorted(counts.items())]
    return "## Machines and versions\n\n" + markdown([*keys, "runs"], rows)
