"""What a stage-1 step costs beside the plain authors' step: counted, not timed, so that it is the same on any machine.

At an eighth of BLIP-2's width: a full-size step takes minutes beside other tests.
"""

from __future__ import annotations

import pytest
import torch
from measure import flops, saved_bytes
from stage1_step import FULL_LENGTH, Case, Sides, agree, both_sides, step

CASES = {"coco": Case(batch=3, eighth=True), "full length": Case(batch=3, eighth=True, tokens=FULL_LENGTH)}
# Work at least so many times smaller, memory at most this share: the counts of this code and little more.
BOUNDS = {"coco": (1.95, 0.4), "full length": (1.32, 0.57)}


@pytest.fixture(scope="module", params=CASES)
def counted(request) -> tuple[Sides, tuple[float, float]]:
    return both_sides(CASES[request.param]), BOUNDS[request.param]


def test_the_same_losses_and_gradients(counted) -> None:
    assert set(agree(counted[0], torch.float32)) == {"itc", "itm", "itg", "gradients"}


def test_work_and_memory_beside_the_plain_step(counted) -> None:
    sides, (least_ratio, most_memory) = counted
    plain, ours = (flops(lambda losses=losses: step(sides.model, losses)) for losses in (sides.plain, sides.ours))
    assert plain / ours > least_ratio
    assert saved_bytes(sides.model, sides.ours) < most_memory * saved_bytes(sides.model, sides.plain)
