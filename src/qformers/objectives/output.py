"""What objectives have in common: what they read of a batch, and what they give the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qformers.data.batch import Batch
from qformers.models.reader import ImageReader

Drawing = Callable[[int], AbstractContextManager[None]]
"""The arithmetic and the random numbers of a step's forward pass of this number, from 0: entered twice, they are the
same twice."""


@dataclass(frozen=True)
class StepOutput:
    """Named loss terms, and scalars worth logging (detached).

    The mean of a term over all forward passes of a step and over all processes is the step's loss.
    """

    losses: dict[str, Float[Tensor, ""]]
    stats: dict[str, Float[Tensor, ""]]

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.losses.values())).sum()


def patch_embeds_of(batch: Batch, model: ImageReader) -> Float[Tensor, "batch patches vision_dim"]:
    """The precomputed features that the batch carries, or else its pixels through the image encoder."""
    if batch.patch_embeds is not None:
        return batch.patch_embeds
    assert batch.pixel_values is not None, "a batch carries pixels or precomputed features"
    return model.vision_encoder(batch.pixel_values)


def row_slices(rows: int, micro_batch_size: int | None) -> list[slice]:
    """`rows` cut into runs of `micro_batch_size`, the last one shorter where it must be; None: uncut."""
    size = micro_batch_size or rows
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def count_passes(batches: Sequence[Batch], micro_batch_size: int | None) -> int:
    """How many forward passes `batches` take."""
    return sum(len(row_slices(len(batch), micro_batch_size)) for batch in batches)
