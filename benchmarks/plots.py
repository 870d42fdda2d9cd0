"""A result as a picture: its ratios with their spread, and a curve for each thing that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(name: str, result: dict[str, Any], file: Path) -> None:
    """Every `ratio…` of the result as a bar from smallest to largest, and each entry of `curves` as lines over its `x`.

    `curves` is {"x": [label, values], another label: {line: values}, …}.
    """
    ratios = {key: value for key, value in result.items() if "ratio" in key and isinstance(value, dict)}
    curves = dict(result.get("curves", {}))
    x_label, x_values = curves.pop("x", ["", []])
    panels = len(curves) + bool(ratios)
    figure = Figure(figsize=(5 * max(panels, 1), 3.4), layout="constrained")
    axes = list(figure.subplots(1, max(panels, 1), squeeze=False)[0])
    if ratios:
        bars = axes.pop(0)
        middles = [value["median"] for value in ratios.values()]
        spread = [
            [value["median"] - value["min"] for value in ratios.values()],
            [value["max"] - value["median"] for value in ratios.values()],
        ]
        bars.barh(list(ratios), middles, xerr=spread, capsize=4, color="#8fb5ee", ecolor="#1c57b5")
        bars.axvline(1.0, color="#495057", linewidth=1)
        bars.set(xlabel="peer's time / ours", title=name)
        bars.invert_yaxis()
    for panel, (label, lines) in zip(axes, curves.items(), strict=False):
        for line, values in lines.items():
            panel.plot(x_values[: len(values)], values, marker="o", label=line)
        highest = max(max(values) for values in lines.values())
        # Room above the curves for the legend, which lies over none of them then.
        panel.set(xlabel=x_label, ylabel=label, ylim=(0, 1.35 * highest), title="" if ratios else name)
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left")
    figure.savefig(file, dpi=120)
