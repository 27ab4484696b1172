"""Plots extrapolation: perplexity against length, and the loss by position at the longest length.

Each model is a curve, drawn from the results of `perplexity_by_length`:

    plot_extrapolation([Curve("ALiBi", 256, alibi_results), Curve("sinusoidal", 256, sinusoidal_results)], "plot.png")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .perplexity import Result, mean_by_doubling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The palette of Okabe and Ito (2008), whose colours people with any colour vision can distinguish.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GREY = "#666666"

# Settings of matplotlib, for `pyplot.style.use(STYLE)`. Text is large enough to read at half the size of the plot.
STYLE = {
    "figure.figsize": (7.5, 4.2),
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "lines.linewidth": 2,
}


@dataclass(frozen=True)
class Curve:
    """One checkpoint in the plot.

    Attributes:
        label: Its name in the legend.
        training_length: In tokens; None if unknown, which leaves out its mark.
        results: In the order of their lengths.
    """

    label: str
    training_length: int | None
    results: Sequence[Result]


def require_matplotlib() -> None:
    """Raises `UserError` if matplotlib, which only plots need, is not installed."""
    if find_spec("matplotlib") is None:
        raise UserError("drawing the plot needs matplotlib: pip install 'hf_alibi[train]'")


def plot_extrapolation(curves: Sequence[Curve], path: str | Path) -> None:
    """Draws `curves` to the image file `path`. Raises `UserError` if matplotlib is not installed."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=160, layout="constrained")
    by_length, by_position = figure.subplots(1, 2)
    longest = max(result.length for curve in curves for result in curve.results)
    for index, curve in enumerate(curves):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linewidth": 2,
            "markersize": 5,
        }
        by_length.plot([r.length for r in curve.results], [r.perplexity for r in curve.results], **style)
        at_longest = mean_by_doubling(curve.results[-1].nats_by_position)
        by_position.plot(list(at_longest), list(at_longest.values()), **style)
    training_lengths = sorted({curve.training_length for curve in curves if curve.training_length is not None})
    by_length.set(xlabel="length in tokens", ylabel="perplexity per token")
    legend = by_length.legend(by_length.get_lines(), [curve.label for curve in curves], frameon=False)
    for text in legend.get_texts():
        # A dollar sign in a label is no formula.
        text.set_parse_math(False)
    by_position.set(xlabel="tokens of context", ylabel="loss in nats per token")
    dress(by_length, "Perplexity against length")
    dress(by_position, f"Loss by position at length {longest:,}")
    for axes in (by_length, by_position):
        axes.grid(visible=False, axis="x")
        _mark(axes, training_lengths)
    figure.savefig(path)


def dress(axes: "Axes", title: str) -> None:
    """Gives `axes` a title, a log₂ x-axis in plain numbers and a light grid."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(axes: "Axes", training_lengths: Sequence[int]) -> None:
    """Draws a line at each training length."""
    for length in training_lengths:
        axes.axvline(length, color=GREY, linestyle=":", zorder=0)
        # x is in data coordinates, y a fraction of the height.
        transform = axes.get_xaxis_transform()
        axes.text(length, 1, f" trained at {length:,}", transform=transform, va="top", color=GREY, fontsize=9)
