"""A data set's distinct pictures through the image encoder, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qformers.data.dataset import ImageView, collate
from qformers.errors import DataError
from qformers.models.vision import VisionEncoder

PICTURES_AT_ONCE = 32


@torch.inference_mode()
def patch_batches(
    encoder: VisionEncoder, view: ImageView, what: str = "encoding pictures"
) -> Iterator[Float[Tensor, "batch patches vision_dim"]]:
    """Patch embeddings of all pictures, precomputed or computed now.

    Raises:
        DataError: a picture is broken; leaving it out would change the figures.
    """
    device = next(encoder.parameters()).device
    starts = range(0, len(view), PICTURES_AT_ONCE)
    for start in track(starts, what, console=Console(stderr=True), transient=True):
        batch = collate([view[row] for row in range(start, min(start + PICTURES_AT_ONCE, len(view)))])
        if batch.broken:
            broken = batch.broken[0]
            raise DataError(f"{broken.name}: {broken.reason}: evaluation needs every picture; mend or remove it")
        patches = batch.patch_embeds
        if patches is None:
            assert batch.pixel_values is not None
            patches = encoder(batch.pixel_values.to(device))
        yield patches
