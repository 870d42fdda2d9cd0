"""Run benchmarks: `python benchmarks/run.py [NAME] --output DIR` writes DIR/NAME.json and prints the ratios.

A ratio is the peer's time divided by ours, both measured in turn in this run: above 1, we are faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import attention
import loading
import rerank
import stage1_step

BENCHMARKS: dict[str, Callable[[], dict[str, object]]] = {
    "attention": attention.run,
    "loading": loading.run,
    "rerank": rerank.run,
    "stage1_step": stage1_step.run,
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
        ratio = result["ratio"]
        print(f"{name}: {ratio['median']:.2f} x the peer's speed ({ratio['min']:.2f} to {ratio['max']:.2f})")


if __name__ == "__main__":
    main()
