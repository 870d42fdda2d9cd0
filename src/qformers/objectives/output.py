"""What objectives have in common: what they read of a batch's pictures, and what they give the training loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qformers.data.batch import Batch
from qformers.models.reader import ImageReader


@dataclass(frozen=True)
class StepOutput:
    """Named loss terms, and scalars worth logging (detached)."""

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
