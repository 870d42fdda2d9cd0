"""The page's pictures: means over the seeds, with error bars of one standard deviation and every seed as a dot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qformers.report.figures import THEMES, new_figure
from qformers.study.questions import METRICS, Question

THEME = THEMES["light"]
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Arm → seed → what `running.run_arm` returned."""


def draw(question: Question, results: Results, file: Path) -> None:
    """The figure of `question` as PNG; arms without a result are left out."""
    drawings: dict[str, Callable[[Question, Results], Figure]] = {
        "bars": draw_bars,
        "curves": draw_curves,
        "queries": draw_queries,
    }
    drawings[question.figure](question, results).savefig(file, dpi=130, facecolor="white")


def draw_bars(question: Question, results: Results) -> Figure:
    """The first metric of each arm."""
    known = [arm for arm in question.arms if results.get(arm.name)]
    metric = question.metrics[0]
    figure, axes = new_figure(THEME, width=6.4, height=1.0 + 0.5 * max(len(known), 1))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=THEME.grid, linewidth=0.7)
    for place, arm in enumerate(known):
        values = [result["metrics"][metric] for result in results[arm.name].values()]
        axes.barh(place, np.mean(values), 0.6, xerr=_spread(values), color=THEME.methods[1], ecolor=THEME.text)
        axes.plot(values, [place] * len(values), "o", color=THEME.methods[0], markersize=3.5)
    axes.set_yticks(range(len(known)), [question.title_of(arm) for arm in known])
    axes.invert_yaxis()
    axes.set_xlabel(METRICS[metric], fontsize=8.5, color=THEME.text)
    return figure


def draw_curves(question: Question, results: Results) -> Figure:
    """The held-out loss over the steps."""
    figure, axes = new_figure(THEME, width=6.4, height=3.2)
    for number, arm in enumerate(question.arms):
        curves = [np.array(result["curve"]) for result in results.get(arm.name, {}).values()]
        if not curves:
            continue
        steps, losses = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
        spread = [_spread(column) for column in losses.T]
        colour = THEME.methods[2 * number]
        axes.errorbar(
            steps, losses.mean(axis=0), spread, color=colour, marker="o", markersize=3.5, label=question.title_of(arm)
        )
    axes.set_xlabel("step of stage 2", fontsize=8.5, color=THEME.text)
    axes.set_ylabel(METRICS["lm"], fontsize=8.5, color=THEME.text)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=False, fontsize=8, labelcolor=THEME.text)
    return figure


def draw_queries(question: Question, results: Results) -> Figure:
    """Recall by the work of a step, each point a number of queries."""
    figure, axes = new_figure(THEME, width=6.4, height=3.2)
    metric = question.metrics[0]
    for arm in question.arms:
        found = list(results.get(arm.name, {}).values())
        if not found:
            continue
        work = found[0]["cost"]["step_gflop"]
        values = [result["metrics"][metric] for result in found]
        axes.errorbar([work], [np.mean(values)], [_spread(values)], color=THEME.methods[0], marker="o")
        axes.plot([work] * len(values), values, "o", color=THEME.methods[1], markersize=3.5)
        axes.annotate(
            question.title_of(arm), (work, float(np.mean(values))), (6, 3), textcoords="offset points", fontsize=7.5
        )
    axes.set_xlabel(METRICS["step_gflop"], fontsize=8.5, color=THEME.text)
    axes.set_ylabel(METRICS[metric], fontsize=8.5, color=THEME.text)
    return figure


def _spread(values: Any) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
