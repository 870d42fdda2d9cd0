"""METEOR and SPICE through pycocoevalcap, where it and a Java are installed; else a reason why not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qformers.evaluation.caption_metrics import check_references
from qformers.evaluation.caption_tokens import tokenize

SCORERS = {"meteor": "pycocoevalcap.meteor.meteor.Meteor", "spice": "pycocoevalcap.spice.spice.Spice"}

# In a process of its own: the scorers print, and where Java fails them they may wait for ever. What counts is the
# last line.
_CHILD = """
import importlib, json, sys
module, _, scorer = sys.argv[1].rpartition(".")
references, candidates = ({row: texts for row, texts in enumerate(side)} for side in json.load(sys.stdin))
try:
    score, _ = getattr(importlib.import_module(module), scorer)().compute_score(references, candidates)
    answer = {"score": float(score)}
except Exception as error:
    answer = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
print("\\n" + json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class JavaScore:
    """A score, 0–1, or None and the reason."""

    value: float | None
    reason: str | None = None


def java_metrics(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[Literal["meteor", "spice"]] = ("meteor", "spice"),
    timeout_seconds: float = 3600,
) -> dict[str, JavaScore]:
    """METEOR 1.5 and SPICE 1.0 of one caption a picture, as `pip install pycocoevalcap` computes them.

    Never raises for what is missing on the machine: Java, the package, SPICE's models (it downloads them on first
    use), memory, time. A score not computed is None, its reason one line.

    Raises:
        DataError: the captions themselves are wrong, as in `caption_metrics`.
    """
    check_references(candidates, references)
    return {name: _score(name, candidates, references, timeout_seconds) for name in metrics}


def _score(
    name: str, candidates: Sequence[str], references: Sequence[Sequence[str]], timeout_seconds: float
) -> JavaScore:
    if shutil.which("java") is None:
        return _not_computed("no Java")
    if importlib.util.find_spec("pycocoevalcap") is None:
        return _not_computed("pycocoevalcap is not installed")
    sides = (
        [[" ".join(tokenize(text)) for text in texts] for texts in references],
        [[" ".join(tokenize(text))] for text in candidates],
    )
    command = [sys.executable, "-c", _CHILD, SCORERS[name]]
    try:
        done = subprocess.run(
            command, input=json.dumps(sides), capture_output=True, encoding="utf-8", timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return _not_computed(f"no answer within {timeout_seconds:g} s")
    try:
        answer = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        return _not_computed(f"its process ended with code {done.returncode}")
    if "error" in answer:
        return _not_computed(answer["error"])
    return JavaScore(answer["score"])


def _not_computed(reason: str) -> JavaScore:
    return JavaScore(None, f"not computed: {reason}")
