"""The runs that are compared. An arm is a name, and how its settings differ from those of the demo's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["retrieval", "captions", "answers"]
Start = Literal["contrast", "base", "untrained"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    `task` says what is trained and measured: stage 1, captions of stage 2, or answers of stage 2. `changes` are by part
    of `TrainConfig` and setting. `start` names what the run goes on from: the arm of ITC alone or the base arm, of the
    same seed, or the Q-Former before the first step. Stage 1 from nothing is of ITC alone: what several arms begin with
    is trained once. `records` are the captions it learns: `train`, `noisy` or `cleaned`.
    """

    name: str
    title: str
    task: Task = "retrieval"
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    start: Start | None = None
    records: str = "train"


CONTRAST = Arm("contrast", "ITC alone")
LAST_LAYER = Arm("last_layer", "last layer", changes={"model": {"vision_layer": -1}})
BASE = Arm("base", "ITC + ITM + ITG", start="contrast")
NO_ITG = Arm("no_itg", "ITC + ITM", changes={"objectives": {"itg": False}}, start="contrast")
HARD = Arm(
    "hard_negatives", "hard negatives alone", "retrieval", {"objectives": {"hard_negative_fraction": 1.0}}, "contrast"
)
RANDOM = Arm(
    "random_negatives",
    "random negatives alone",
    "retrieval",
    {"objectives": {"hard_negative_fraction": 0.0}},
    "contrast",
)
NOISY = Arm("noisy", "noisy captions", records="noisy")
CLEANED = Arm("cleaned", "cleaned captions", records="cleaned")

CAPTIONS = Arm("captions", "Q-Former, after stage 1", "captions", start="base")
UNTRAINED = Arm("captions_without_stage_1", "Q-Former, without stage 1", "captions", start="untrained")
BRIDGES = tuple(
    Arm(f"captions_{bridge}", title, "captions", {"model": {"bridge": bridge}})
    for bridge, title in (
        ("linear", "linear projection of pooled patches"),
        ("mlp", "MLP on pooled patches"),
        ("perceiver", "Perceiver resampler"),
    )
)

READS_QUESTION = Arm("answers", "queries read the question", "answers", start="base")
READS_NOTHING = Arm(
    "answers_unconditioned",
    "queries read a text without words",
    "answers",
    {"language": {"qformer_reads": "empty"}},
    start="base",
)


def with_queries(count: int, of_demo: int) -> Arm:
    """The arm of ITC alone with so many queries; itself where they are the demo's number."""
    if count == of_demo:
        return CONTRAST
    return Arm(
        f"queries_{count}", "1 query" if count == 1 else f"{count} queries", changes={"model": {"num_queries": count}}
    )


def with_their_starts(arms: list[Arm]) -> list[Arm]:
    """Each arm once, behind what it needs: a model to go on from, a captioner and a ranker to clean captions."""
    found: list[Arm] = []
    for arm in arms:
        starts = {"contrast": [CONTRAST], "base": [CONTRAST, BASE]}.get(arm.start or "", [])
        needed = [CONTRAST, BASE, CAPTIONS] if arm.records == "cleaned" else starts
        found += [one for one in (*needed, arm) if one not in found]
    return found
