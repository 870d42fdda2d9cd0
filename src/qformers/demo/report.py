"""The demo's report: one HTML file that shows what was trained, what it reached, and on what.

`write_report` only lays out what a `DemoResults` holds; the demo's runner measures and fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from qformers.demo import plots
from qformers.errors import DataError
from qformers.evaluation.attention import attention_overlay
from qformers.report.figures import picture_uri, themed
from qformers.report.page import write_page

TABLE_COLUMNS = tuple(
    (direction, recall) for direction in ("t2i", "i2t") for recall in ("r1", "r5", "r10", "median_rank")
)
MAX_OVERLAYS = 12


@dataclass(frozen=True)
class TextQuery:
    """One text, the pictures ranked highest for it (best first), and where the right one came."""

    text: str
    pictures: Sequence[Image.Image]
    right: Sequence[bool]  # for each of `pictures`
    rank: int  # of the right picture, from 1
    right_picture: Image.Image


@dataclass(frozen=True)
class ImageQuery:
    """One picture, the texts ranked highest for it (best first), and where the best right one came."""

    picture: Image.Image
    texts: Sequence[str]
    right: Sequence[bool]  # for each of `texts`
    rank: int  # of the best right text, from 1
    right_text: str


@dataclass(frozen=True)
class Evaluation:
    """Retrieval on one held-out set.

    `held_out` is a sentence: what of these pictures training never saw. `itm_weight` is ITM's beside ITC's logit in
    re-ranking. `methods` gives each method's
    `retrieval_metrics` by the name shown; the one the report is about comes first.
    """

    title: str
    held_out: str
    images: int
    texts: int
    itm_weight: float
    methods: Mapping[str, Mapping[str, float]]
    text_queries: Sequence[TextQuery] = ()
    image_queries: Sequence[ImageQuery] = ()


@dataclass(frozen=True)
class AttentionExample:
    """A held-out picture and, for some queries, the cross-attention over its patches."""

    picture: Image.Image
    title: str
    queries: Sequence[int]
    maps: Float[np.ndarray, "queries rows columns"]


@dataclass(frozen=True)
class CaptionExample:
    """A held-out scene, what the model says of it, what is true of it, and which of its objects were named."""

    picture: Image.Image
    caption: str
    reference: str
    named: Mapping[str, bool]


@dataclass(frozen=True)
class Captions:
    """Captioning of so many pictures: each method's scores by the name shown, and examples as they are."""

    pictures: int
    methods: Mapping[str, Mapping[str, float]]
    examples: Sequence[CaptionExample]


@dataclass(frozen=True)
class AnswerExample:
    """A picture of the test set, a question about it, what the model answers and what is true."""

    picture: Image.Image
    question: str
    answer: str
    truth: str


@dataclass(frozen=True)
class Answering:
    """So many questions by so many types: each method's accuracies by the name shown, and examples as they are.

    `methods` are as `score_answers` gives them; `steps` and `minutes` are of one training run.
    """

    questions: int
    types: Sequence[str]
    methods: Mapping[str, Mapping[str, float]]
    examples: Sequence[AnswerExample]
    steps: int
    minutes: float


@dataclass(frozen=True)
class Source:
    """A package whose model, pictures or words were used. `home` is shown as text, never linked."""

    name: str
    version: str
    licence: str
    home: str
    used_for: str


@dataclass(frozen=True)
class Training:
    """What was trained, for the summary."""

    image_encoder: str
    text_start: str
    trainable_parameters: int
    queries: int
    objectives: Sequence[str]
    pictures: int
    captions: int
    steps: int
    batch_size: int
    seconds: float
    machine: str


@dataclass(frozen=True)
class DemoResults:
    """Everything the report shows. `loss_rows` are the rows of each run's `metrics.jsonl`."""

    training: Training
    loss_rows: Sequence[Mapping[str, float]]
    evaluations: Sequence[Evaluation]
    attention: Sequence[AttentionExample]
    seconds: Mapping[str, float]
    settings: Mapping[str, object]
    rerun: Sequence[str]  # shell commands
    sources: Sequence[Source]
    captioning_loss_rows: Sequence[Mapping[str, float]] = ()
    captions: Captions | None = None
    answering: Answering | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)  # what → why
    notes: Sequence[str] = ()


def write_report(output_folder: str | Path, results: DemoResults) -> Path:
    """Write `report.html` into `output_folder` and return its path; the file needs nothing beside itself.

    DataError when an evaluation has no methods or a method lacks a recall.
    """
    for evaluation in results.evaluations:
        _check(evaluation)
    return write_page(
        output_folder,
        "qformers.demo",
        {"figure": _figure, "setting": _setting},
        results=results,
        training=results.training,
        columns=TABLE_COLUMNS,
        losses=_losses(results.loss_rows),
        captioning_losses=_losses(results.captioning_loss_rows),
        evaluations=[_evaluation(evaluation) for evaluation in results.evaluations],
        attention=[_attention(example) for example in results.attention],
        total_seconds=sum(results.seconds.values()),
    )


def _check(evaluation: Evaluation) -> None:
    if not evaluation.methods:
        raise DataError(f"report: evaluation {evaluation.title!r} has no methods to show")
    needed = [f"{direction}_{recall}" for direction in ("t2i", "i2t") for recall in plots.RECALLS]
    for name, metrics in evaluation.methods.items():
        missing = [key for key in needed if key not in metrics]
        if missing:
            raise DataError(f"report: method {name!r} of {evaluation.title!r} lacks {', '.join(missing)}")


def _losses(rows: Sequence[Mapping[str, float]]) -> list[dict[str, object]]:
    """One figure for each loss that was logged."""
    figures = []
    for term, name in plots.LOSS_NAMES.items():
        values = [row[f"loss/{term}"] for row in rows if f"loss/{term}" in row]
        if values:
            alt = f"{name} over the steps of training, from {values[0]:.2f} to {values[-1]:.2f}"
            figures.append({"alt": alt, "uris": themed(plots.draw_loss, rows, term)})
    return figures


def _evaluation(evaluation: Evaluation) -> dict[str, object]:
    first = next(iter(evaluation.methods.values()))
    best = {f"{direction}_{column}": _best(evaluation, f"{direction}_{column}") for direction, column in TABLE_COLUMNS}
    return {
        "facts": evaluation,
        "best": best,
        "figures": [
            {
                "alt": f"{evaluation.title}: recall of each method, {words}; the numbers are in the table below",
                "uris": themed(plots.draw_recalls, evaluation.methods, direction),
            }
            for direction, words in (("t2i", "text to picture"), ("i2t", "picture to text"))
        ],
        "errors": {
            "t2i": _standard_error(first["t2i_r1"], evaluation.texts),
            "i2t": _standard_error(first["i2t_r1"], evaluation.images),
        },
    }


def _best(evaluation: Evaluation, key: str) -> float | None:
    values = [metrics[key] for metrics in evaluation.methods.values() if key in metrics]
    if not values:
        return None
    return min(values) if key.endswith("median_rank") else max(values)


def _standard_error(recall: float, queries: int) -> float:
    """Of a recall over so many independent queries (binomial)."""
    return math.sqrt(recall * (1 - recall) / queries)


def _attention(example: AttentionExample) -> dict[str, object]:
    if len(example.queries) != len(example.maps):
        raise DataError(
            f"report: attention of {example.title!r} has {len(example.maps)} maps for {len(example.queries)} queries"
        )
    overlays = [
        {"query": query, "uri": picture_uri(attention_overlay(example.picture, attention), 160)}
        for query, attention in list(zip(example.queries, example.maps, strict=True))[:MAX_OVERLAYS]
    ]
    return {"title": example.title, "picture": picture_uri(example.picture, 160), "overlays": overlays}


def _figure(value: float | None, column: str = "") -> str:
    """A recall with three decimals, a median rank with at most one, a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:g}" if column == "median_rank" else f"{value:.3f}"


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
