"""The plots of a study, from its JSON files alone: lengths, positions, copies, and windows along training."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import COLOURS, GREY, MARKERS, dress
from .records import Record, grouped, label, lengths_of, of, perplexities, texts_of
from .runs import MAIN, WINDOWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Points = dict[int, list[float]]


def draw_figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draws every plot that there are records for, and returns the files."""
    main = of(records, MAIN)
    drawn: list[Path] = []
    for length in sorted({record["settings"]["training_length"] for record in main}):
        group = [record for record in main if record["settings"]["training_length"] == length]
        for text in texts_of(group):
            drawn.append(_lengths(group, text, length, folder / f"lengths-{text}-L{length}.png"))
        drawn.append(_positions(group, length, folder / f"positions-L{length}.png"))
        if any(record["copies"] for record in group):
            drawn.append(_copies(group, length, folder / f"copies-L{length}.png"))
    if watched := [record for record in of(records, WINDOWS) if record["training"]["windows"]]:
        drawn.append(_windows(watched, folder / "windows.png"))
    return drawn


def _lengths(records: Sequence[Record], text: str, length: int, path: Path) -> Path:
    """Perplexity against length with both protocols, with bands of one standard deviation."""
    figure, panels = _figure(2)
    for axes, key, title in zip(panels, ("nats", "sliding"), ("non-overlapping", "sliding windows"), strict=True):
        _curves(axes, records, partial(_by_length, text, key))
        _finish(axes, f"Perplexity on {text}, {title}", "length in tokens", "perplexity per token", length)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
    return _save(figure, panels[0], path)


def _by_length(text: str, key: str, group: Sequence[Record]) -> "Points":
    return {length: perplexities(group, text, length, key) for length in lengths_of(group, text)}


def _positions(records: Sequence[Record], length: int, path: Path) -> Path:
    """The loss by tokens of context at the longest length that all methods can read."""
    text = texts_of(records)[0]
    figure, (axes,) = _figure(1)

    def by_position(group: Sequence[Record]) -> "Points":
        found: Points = {}
        for record in group:
            tests = [result for result in record["tests"][text].values() if "by_position" in result]
            longest = max(tests, key=lambda result: len(result["by_position"]))
            for end, loss in longest["by_position"].items():
                found.setdefault(int(end), []).append(loss)
        return found

    _curves(axes, records, by_position)
    _finish(axes, f"Loss by position on {text}", "tokens of context", "loss in nats per token", length)
    return _save(figure, axes, path)


def _copies(records: Sequence[Record], length: int, path: Path) -> Path:
    """What the copy of a segment saves by distance."""
    figure, (axes,) = _figure(1)

    def saved(group: Sequence[Record]) -> "Points":
        found: Points = {}
        for record in group:
            for distance, result in record["copies"].items():
                if "copy" in result:
                    found.setdefault(int(distance), []).append(result["control"] - result["copy"])
        return found

    _curves(axes, records, saved)
    _finish(axes, "What a copied segment saves", "tokens from one beginning to the other", "nats per token", length)
    return _save(figure, axes, path)


def _windows(records: Sequence[Record], path: Path) -> Path:
    """U and the keys of a query along training, a line for each layer of the first run, and others beside it."""
    figure, panels = _figure(2)
    kinds = (
        ("score_bound", "U, the bound on scores", "nats"),
        ("keys", "Keys that a query looks at", "keys, all heads"),
    )
    for axes, (key, title, unit) in zip(panels, kinds, strict=True):
        for number, (_, group) in enumerate(grouped(records).items()):
            points = group[0]["training"]["windows"]
            for layer in range(len(points[0][key])):
                axes.plot(
                    [point["step"] for point in points],
                    [point[key][layer] for point in points],
                    color=COLOURS[number % len(COLOURS)],
                    alpha=1 - 0.6 * layer / len(points[0][key]),
                    label=f"{group[0]['settings']['variant']}, layer {layer}",
                )
        axes.set(xlabel="step", ylabel=unit)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.grid(color="#E5E5E5")
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, panels[0], path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels + 1.5, 4.4), dpi=140, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _curves(axes: "Axes", records: Sequence[Record], points: Callable[[Sequence[Record]], "Points"]) -> None:
    """Draws a line for each method through the means over seeds, in a band of one standard deviation."""
    for number, ((variant, _), group) in enumerate(grouped(records).items()):
        found = {x: values for x, values in sorted(points(group).items()) if values}
        if not found:
            continue
        colour = COLOURS[number % len(COLOURS)]
        # More methods than colours: those after the first round are dashed.
        style = "-" if number < len(COLOURS) else "--"
        means = [mean(values) for values in found.values()]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(list(found), means, style, color=colour, marker=marker, markersize=4, label=label(variant))
        if all(len(values) > 1 for values in found.values()):
            spread = [stdev(values) for values in found.values()]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(list(found), low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: "Axes", title: str, xlabel: str, ylabel: str, length: int) -> None:
    dress(axes, title)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.axvline(length, color=GREY, linestyle=":", zorder=0)


def _save(figure: Any, axes: "Axes", path: Path) -> Path:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    # Without the version of matplotlib, which would change the bytes.
    figure.savefig(path, metadata={"Software": None})
    return path
