"""Run benchmarks: `python benchmarks/run.py [NAME] --output DIR` writes DIR/NAME.json and .png and prints the ratios.

A ratio is the peer's time divided by ours, both measured in turn in this run: above 1, we are faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attention
import captioning
import feature_extraction
import growth
import loading
import rerank
import stage1_step
import stage2_step
import start_up
from plots import draw

BENCHMARKS: dict[str, Callable[[], dict]] = {
    "attention": attention.run,
    **{name: partial(captioning.run, *case) for name, case in captioning.CASES.items()},
    "feature_extraction": feature_extraction.run,
    **{name: partial(growth.run, name) for name in growth.CURVES},
    "loading": loading.run,
    "rerank": rerank.run,
    **{name: partial(stage1_step.run, case) for name, case in stage1_step.CASES.items()},
    "stage2_step": partial(stage2_step.run, 16),
    "start_up": start_up.run,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), help="one benchmark; all if left out")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in [options.name] if options.name else sorted(BENCHMARKS):
        result = BENCHMARKS[name]()
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(name, result, options.output / f"{name}.png")
        print(summary(name, result), flush=True)


def summary(name: str, result: dict) -> str:
    """One line: the ratio and its spread, and what else there is of memory, work and peak."""
    parts = []
    if ratio := result.get("ratio"):
        parts.append(f"{ratio['median']:.2f} x the peer's speed ({ratio['min']:.2f} to {ratio['max']:.2f})")
    if "memory_ratio" in result:
        parts.append(f"{result['memory_ratio']:.2f} x its memory")
    if "flops" in result:
        parts.append(f"{result['flops'] / 1e9:.0f} GFLOP")
    if "peak_fraction" in result:
        parts.append(f"{result['peak_fraction']:.0%} of this machine's matrix speed")
    return f"{name}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
