"""The JSON files of a study as tables and plots need them: grouped, and with means over seeds."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..errors import UserError
from .files import read_json
from .methods import METHODS
from .runs import MAIN

Record = dict[str, Any]
Key = tuple[str, int]

PAPER = read_json(Path(__file__).parent / "paper.json")
SOURCE = "Press, Smith, Lewis, arXiv 2108.12409"
# A method has not converged like the others if its held-out loss exceeds the median of the methods at the same
# training length by more nats than this.
FAR_FROM_OTHERS = 0.1


def load_records(folder: Path) -> list[Record]:
    """Returns the results of all finished runs in the order of their names.

    Raises:
        UserError: If there is none.
    """
    paths = sorted((folder / "runs").glob("[!.]*.json"))
    if not paths:
        raise UserError(f"{folder} has no finished runs; leave out --tables to make them")
    return [read_json(path) for path in paths]


def of(records: Iterable[Record], question: str) -> list[Record]:
    """Returns the records of one question of the plan."""
    return [record for record in records if record["settings"]["question"] == question]


def grouped(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Returns the records by variant and training length, in the order of `METHODS`, with all seeds together."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        settings = record["settings"]
        groups.setdefault((settings["variant"], settings["training_length"]), []).append(record)
    names = list(METHODS)
    place = {name: number for number, name in enumerate(names)}
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], place.get(item[0][0], len(names)), item[0][0])))


def label(variant: str) -> str:
    """Returns the name of a method for people; that of an ablation is its own."""
    return METHODS[variant].label if variant in METHODS else variant


def final_loss(record: Record) -> float:
    """Returns the last loss on held-out text, in nats per token."""
    return record["training"]["evaluations"][-1][1]


def unconverged(records: Sequence[Record]) -> dict[Key, float]:
    """Returns the methods of the main comparison that have not learnt like the others at their own training length.

    Returns:
        By method and length: by how many nats the mean loss exceeds the median of all methods.
    """
    losses = {key: mean(map(final_loss, group)) for key, group in grouped(of(records, MAIN)).items()}
    found = {}
    for (variant, length), loss in losses.items():
        peers = sorted(other for (_, at), other in losses.items() if at == length)
        middle = (peers[(len(peers) - 1) // 2] + peers[len(peers) // 2]) / 2
        if loss - middle > FAR_FROM_OTHERS:
            found[variant, length] = loss - middle
    return found


def over_seeds(values: Iterable[float | None], form: str = ".2f") -> str:
    """Returns mean ± standard deviation of the values, the value alone if there is one, or a dash."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) == 1:
        return format(known[0], form)
    return f"{mean(known):{form}} ± {stdev(known):{form.removeprefix('+')}}"


def results(group: Iterable[Record], text: str, length: int, key: str) -> list[float]:
    """Returns a result of each seed on a text at a length, without those that there are not."""
    at = (record["tests"].get(text, {}).get(str(length), {}) for record in group)
    return [found[key] for found in at if key in found]


def perplexities(group: Iterable[Record], text: str, length: int, key: str = "nats") -> list[float]:
    """Returns the perplexity of each seed, from the loss under `key`."""
    return [math.exp(nats) for nats in results(group, text, length, key)]


def cell(group: Sequence[Record], text: str, length: int, key: str = "nats") -> str:
    """Returns the perplexity of a group in a table: mean ± sd over seeds, or why there is none."""
    at = [record["tests"].get(text, {}).get(str(length), {}) for record in group]
    if any("unreadable" in found for found in at):
        return "cannot read it"
    return over_seeds(perplexities(group, text, length, key))


def lengths_of(records: Iterable[Record], text: str) -> list[int]:
    """Returns all lengths at which a text was tested."""
    return sorted({int(length) for record in records for length in record["tests"].get(text, {})})


def texts_of(records: Iterable[Record]) -> list[str]:
    """Returns the names of the texts that were tested."""
    return sorted({text for record in records for text in record["tests"]})


def by_distance(records: Iterable[Record], read: Callable[[Record], dict[str, Any]]) -> list[int]:
    """Returns the distances that `read` finds in the records."""
    return sorted({int(distance) for record in records for distance in read(record)})
