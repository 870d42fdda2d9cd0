"""How work and memory of a stage-1 step grow: with the batch, with the size of the pictures, with the queries.

Counted at full size on captions of 12 tokens, forward and backward, for one image: GFLOP by torch's counter, and MB
kept for the backward pass. Nothing is timed, so that the curves are the same on any machine. The plain authors' step
is drawn beside ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from full_size import PATCHES, VISION_DIM, GivenFeatures, captions, next_row_negatives, stage1_model, trimmed_batch
from measure import Result, flops, machine, saved_bytes
from plain_stage1 import plain_losses
from stage1_step import Losses, step

from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.stage1 import Stage1Objective

QUERIES, ROWS, PATCH_PX, TOKENS = 32, 2, 14, (12, 13)


@dataclass(frozen=True)
class Point:
    """One step's sizes."""

    rows: int = ROWS
    patches: int = PATCHES
    queries: int = QUERIES


BATCHES, PIXELS, NUMBERS = (1, 2, 4, 8, 16), (224, 364, 490), (1, 8, 16, 32, 64)
CURVES: dict[str, tuple[str, dict[int, Point]]] = {
    "growth_batch": ("images of a batch", {rows: Point(rows=rows) for rows in BATCHES}),
    "growth_image": ("side of the picture, px", {px: Point(patches=(px // PATCH_PX) ** 2 + 1) for px in PIXELS}),
    "growth_queries": ("queries", {queries: Point(queries=queries) for queries in NUMBERS}),
}


def run(name: str) -> Result:
    """The points of one curve."""
    label, points = CURVES[name]
    counted = [count(point) for point in points.values()]
    lines = ("ours", "plain")
    return {
        "curves": {
            "x": [label, list(points)],
            "GFLOP an image": {line: [point[line]["gflop"] for point in counted] for line in lines},
            "MB kept for the backward pass, an image": {
                line: [point[line]["mb"] for point in counted] for line in lines
            },
        },
        **machine(torch.float32),
    }


def count(point: Point) -> dict[str, dict[str, float]]:
    """Work and memory of one image in a step of these sizes, as ours and as the plain implementation do it."""
    torch.manual_seed(0)
    model = stage1_model(GivenFeatures(), num_queries=point.queries)
    objective = Stage1Objective(model, Stage1LossConfig())
    input_ids, attention_mask = captions(point.rows, TOKENS)
    features = torch.randn(point.rows, point.patches, VISION_DIM)
    batch, negatives = trimmed_batch(input_ids, attention_mask, features, None), next_row_negatives(point.rows)

    def ours() -> Losses:
        return objective(batch, negatives).losses

    def plain() -> Losses:
        return plain_losses(model, features, input_ids, attention_mask, negatives)

    sides: dict[str, Callable[[], Losses]] = {"ours": ours, "plain": plain}
    return {
        name: {
            "gflop": flops(lambda: step(model, losses)) / point.rows / 1e9,  # noqa: B023, called at once
            "mb": saved_bytes(model, losses) / point.rows / 1e6,
        }
        for name, losses in sides.items()
    }
