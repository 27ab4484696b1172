"""The style of the plots."""

import matplotlib
from matplotlib import pyplot

from hf_alibi.evaluation.plots import COLOURS, STYLE


def test_the_style_names_settings_of_matplotlib() -> None:
    with pyplot.style.context(STYLE):
        assert [entry["color"] for entry in matplotlib.rcParams["axes.prop_cycle"]] == COLOURS
        for name in set(STYLE) - {"axes.prop_cycle", "figure.figsize"}:
            assert matplotlib.rcParams[name] == STYLE[name], name
