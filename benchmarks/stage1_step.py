"""One stage-1 step, forward and backward, on full-size models: ours against the plain authors' step.

Both compute on the same weights, pictures, captions and negatives; losses and, in fp32, gradients must agree before a
clock is started. `least_flops` is the least work of the same mathematics (`least_work.py`).

`ratio` has each side in a process of its own: ours keeps freed memory, as our training does, the peer has the allocator
as it comes. `ratio_same_allocator` has both in one process that keeps it, so that what is left is the step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from full_size import (
    COCO_TOKENS,
    EIGHTH,
    PADDED_TOKENS,
    PATCHES,
    VISION_DIM,
    VOCABULARY,
    GivenFeatures,
    captions,
    next_row_negatives,
    stage1_model,
    trimmed_batch,
    vit_large,
)
from least_work import stage1_least_flops
from measure import (
    Apart,
    Result,
    Work,
    alternate,
    flops,
    in_turn,
    machine,
    peak_bytes,
    peak_fraction,
    saved_bytes,
)
from plain_stage1 import plain_losses
from torch import Tensor, nn

from qformers.models.stage1 import Stage1Model
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.stage1 import Stage1Objective
from qformers.training.loop import keep_freed_memory

FULL_LENGTH = (PADDED_TOKENS, PADDED_TOKENS + 1)
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative: the same numbers added up in another order
GRADIENT_TOLERANCE = 1e-4  # norm of the difference over the norm

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured. `dtype` is of our arithmetic; the peer's is always fp32. `eighth`: of the width, as a test."""

    batch: int = 16
    tokens: tuple[int, int] = COCO_TOKENS
    dtype: torch.dtype = torch.float32
    from_pixels: bool = False
    eighth: bool = False
    repetitions: int = 3


CASES = {
    "stage1_step": Case(),
    "stage1_step_bf16": Case(dtype=torch.bfloat16),
    "stage1_step_full": Case(batch=8, tokens=FULL_LENGTH),
    "stage1_step_batch4": Case(batch=4),
    "stage1_step_vit": Case(batch=4, from_pixels=True),
}


@dataclass(frozen=True)
class Sides:
    """One step's losses as ours and as the plain implementation compute them."""

    model: Stage1Model
    lengths: list[int]
    ours: Callable[[], Losses]
    plain: Callable[[], Losses]


def run(case: Case) -> Result:
    """Checks that both agree, then times them in turn, each in a process of its own."""
    sides = both_sides(case)
    ours, plain = (lambda: step(sides.model, sides.ours)), (lambda: step(sides.model, sides.plain))
    compared = agree(sides, case.dtype)
    with Apart(our_step, case) as our_process, Apart(plain_step, case) as plain_process:
        timed = in_turn(our_process, plain_process, case.repetitions)
    keep_freed_memory()
    together = alternate(ours, plain, case.repetitions)
    work, plain_work = flops(ours), flops(plain)
    memory, plain_memory = saved_bytes(sides.model, sides.ours), saved_bytes(sides.model, sides.plain)
    return {
        **timed,
        "ratio_same_allocator": together["ratio"],
        "memory_ratio": memory / plain_memory,
        "saved_bytes": {"ours": memory, "peer": plain_memory},
        "peak_bytes": {"ours": peak_bytes(ours), "peer": peak_bytes(plain)},
        "flops": work,
        "peer_flops": plain_work,
        "least_flops": None if case.from_pixels else stage1_least_flops(sides.lengths),
        "peak_fraction": peak_fraction(work, timed["cpu_seconds"]["ours"], case.dtype),
        "peer_peak_fraction": peak_fraction(plain_work, timed["cpu_seconds"]["peer"], torch.float32),
        "agreement": compared,
        "batch": case.batch,
        "images_per_second": case.batch / timed["seconds"]["ours"],
        **machine(case.dtype),
    }


def our_step(case: Case) -> Work:
    """Ours as our training runs it: glibc keeps what is freed for the next step."""
    keep_freed_memory()
    sides = both_sides(case)
    return lambda: step(sides.model, sides.ours)


def plain_step(case: Case) -> Work:
    """The peer's as its users run it: glibc as it comes."""
    sides = both_sides(case)
    return lambda: step(sides.model, sides.plain)


def both_sides(case: Case) -> Sides:
    """The same weights, batch and negatives on both sides."""
    torch.manual_seed(0)
    scale = 8 if case.eighth else 1
    vision_dim, vocabulary = VISION_DIM // scale, VOCABULARY // scale
    encoder = vit_large() if case.from_pixels else GivenFeatures(vision_dim)
    model = stage1_model(encoder, EIGHTH if case.eighth else None, vocabulary)
    objective = Stage1Objective(model, Stage1LossConfig())
    input_ids, attention_mask = captions(case.batch, case.tokens, vocabulary=vocabulary)
    features = None if case.from_pixels else torch.randn(case.batch, PATCHES, vision_dim)
    pixels = torch.randn(case.batch, 3, 224, 224) if case.from_pixels else None
    batch = trimmed_batch(input_ids, attention_mask, features, pixels)
    negatives = next_row_negatives(case.batch)
    half = case.dtype != torch.float32

    def ours() -> Losses:
        with torch.autocast("cpu", case.dtype) if half else nullcontext():
            return objective(batch, negatives).losses

    def plain() -> Losses:
        seen = features if pixels is None else model.vision_encoder(pixels)
        return plain_losses(model, seen, input_ids, attention_mask, negatives)

    return Sides(model, attention_mask.sum(dim=1).tolist(), ours, plain)


def step(model: nn.Module, losses: Callable[[], Losses]) -> Losses:
    """One forward and backward pass, from no gradients to all."""
    model.zero_grad(set_to_none=True)
    found = losses()
    torch.stack(list(found.values())).sum().backward()
    return found


def agree(sides: Sides, dtype: torch.dtype) -> dict[str, float]:
    """How far losses and gradients of both are apart. Ends the benchmark where that is more than rounding."""
    mine = step(sides.model, sides.ours)
    gradients = {name: weight.grad for name, weight in sides.model.named_parameters() if weight.grad is not None}
    theirs = step(sides.model, sides.plain)
    apart = {name: abs(mine[name].item() / loss.item() - 1) for name, loss in theirs.items()}
    weights = dict(sides.model.named_parameters())
    with torch.no_grad():
        difference = sum((gradient - weights[name].grad).square().sum() for name, gradient in gradients.items())
        whole = sum(weight.grad.square().sum() for weight in weights.values() if weight.grad is not None)
        apart["gradients"] = float((difference / whole).sqrt())
    for name, distance in apart.items():
        limit = LOSS_TOLERANCE[dtype] if name in theirs else GRADIENT_TOLERANCE
        if distance > limit and (name in theirs or dtype == torch.float32):
            raise SystemExit(f"{name} differs by {distance}, the limit is {limit}")
    return apart
