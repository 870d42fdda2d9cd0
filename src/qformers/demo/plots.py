"""The figures of the demo's report: curves of the losses, bars of the recalls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from qformers.report.figures import Theme, new_figure

RECALLS = ("r1", "r5", "r10")
LOSS_NAMES = {
    "itc": "contrastive loss (ITC)",
    "itm": "matching loss (ITM)",
    "itg": "captioning loss (ITG)",
    "lm": "language-modelling loss",
}


def draw_loss(rows: Sequence[Mapping[str, float]], term: str, theme: Theme) -> Figure:
    """One loss over the steps: every logged value, their running mean, and the validation values if there are any."""
    figure, axes = new_figure(theme, width=4.2, height=2.7)
    steps, values = _series(rows, f"loss/{term}")
    colour = theme.methods[0]
    window = max(1, len(values) // 20)
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    if len(values) >= window:
        means = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], means, color=colour, linewidth=1.8, label="training")
    validation_steps, validation = _series(rows, f"validation/{term}")
    if validation.size:
        axes.plot(
            validation_steps,
            validation,
            "o-",
            color=theme.methods[2],
            linewidth=1.3,
            markersize=3.5,
            label="validation",
        )
        axes.legend(loc="upper right", frameon=False, fontsize=8, labelcolor=theme.text)
    axes.set_title(LOSS_NAMES.get(term, term), loc="left", fontsize=10, color=theme.text)
    axes.set_xlabel("step", fontsize=8.5, color=theme.text)
    axes.set_ylim(bottom=0)
    return figure


def draw_recalls(methods: Mapping[str, Mapping[str, float]], direction: str, theme: Theme) -> Figure:
    """Recall at 1, 5 and 10 of each method as grouped bars with their values, for "i2t" or "t2i"."""
    figure, axes = new_figure(theme, width=5.4, height=3.1)
    width = 0.84 / len(methods)
    for place, (name, metrics) in enumerate(methods.items()):
        lefts = np.arange(len(RECALLS)) - 0.42 + (place + 0.5) * width
        heights = [metrics[f"{direction}_{recall}"] for recall in RECALLS]
        colour = theme.methods[place % len(theme.methods)]
        axes.bar(lefts, heights, width * 0.92, color=colour, label=name)
        for left, height in zip(lefts, heights, strict=True):
            axes.annotate(
                f"{height:.2f}",
                (left, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=theme.text,
            )
    axes.set_xticks(range(len(RECALLS)), ["R@1", "R@5", "R@10"])
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    title = {"t2i": "Text → picture", "i2t": "Picture → text"}[direction]
    axes.set_title(title, loc="left", fontsize=10, color=theme.text, pad=26)
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=theme.text,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(methods),
        columnspacing=1.1,
        handlelength=1.0,
        handletextpad=0.4,
    )
    return figure


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[key]) for row in rows if key in row]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
