"""Draws the pictures of docs/idea.md and docs/windows.md: `python docs/images/draw.py`."""

from pathlib import Path

import matplotlib
import torch

from hf_alibi import AlibiGPTConfig
from hf_alibi.model.alibi import alibi_bias, alibi_slopes

matplotlib.use("agg")
from matplotlib import pyplot

FOLDER = Path(__file__).parent
HEADS = 8


def draw_bias() -> None:
    """Draws the bias of a steep and of a flat head, and the attention weights of all heads at equal scores."""
    slopes = torch.tensor(alibi_slopes(HEADS))
    positions = torch.arange(32)[None]
    bias = alibi_bias(slopes, positions, positions)[0]
    future = torch.ones(32, 32).triu(1).bool()
    figure, axes = pyplot.subplots(1, 3, figsize=(11.5, 3.4), layout="constrained")
    for axis, head in zip(axes, (0, 3), strict=False):
        image = axis.imshow(bias[head].masked_fill(future, torch.nan), cmap="viridis")
        axis.set(title=f"bias of head {head + 1}, slope 1/{1 / slopes[head]:.0f}", xlabel="key", ylabel="query")
        figure.colorbar(image, ax=axis, label="nats")
    distances = torch.arange(65)
    for head in range(HEADS):
        axes[2].plot(distances, torch.softmax(-slopes[head] * distances, 0), label=f"1/{1 / slopes[head]:.0f}")
    axes[2].set(title="weights at equal scores", xlabel="distance, tokens", yscale="log", ylim=(1e-6, 1))
    axes[2].legend(title="slope", fontsize=7)
    figure.savefig(FOLDER / "bias.png", dpi=150)


def draw_windows() -> None:
    """Draws the window of each head, and the share of causal attention that remains within all windows."""
    config = AlibiGPTConfig(num_attention_heads=HEADS, hidden_size=HEADS * 64)
    windows = torch.tensor(config.window_guarantee().windows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.bar(range(1, HEADS + 1), windows)
    left.set(title="window of each head", xlabel="head", ylabel="tokens", yscale="log")
    lengths = 2 ** torch.arange(8, 18)
    pairs = [
        sum(min(int(window) + 1, n) * (n - (min(int(window) + 1, n) - 1) / 2) for window in windows)
        / (HEADS * n * (n + 1) / 2)
        for n in lengths.tolist()
    ]
    right.plot(lengths, pairs, marker="o")
    right.set(title="share of causal attention left", xlabel="tokens", xscale="log", ylim=(0, 1.05))
    right.set_xscale("log", base=2)
    figure.savefig(FOLDER / "windows.png", dpi=150)


if __name__ == "__main__":
    draw_bias()
    draw_windows()
