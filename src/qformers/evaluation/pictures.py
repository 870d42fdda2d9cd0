"""A data set's distinct pictures through the image encoder, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qformers.data.dataset import ImageView, collate
from qformers.errors import DataError
from qformers.models.vision import VisionEncoder

PICTURES_AT_ONCE = 32


def patch_batches(
    encoder: VisionEncoder, view: ImageView, what: str = "encoding pictures"
) -> Iterator[Float[Tensor, "batch patches vision_dim"]]:
    """Patch embeddings of all pictures, precomputed or computed now, batch by batch.

    Raises:
        DataError: a picture is broken; leaving it out would change the figures.
    """
    starts = range(0, len(view), PICTURES_AT_ONCE)
    for start in track(starts, what, console=Console(stderr=True), transient=True):
        yield patches_of(encoder, view, range(start, min(start + PICTURES_AT_ONCE, len(view))))


@torch.inference_mode()
def patches_of(
    encoder: VisionEncoder, view: ImageView, positions: Iterable[int]
) -> Float[Tensor, "batch patches vision_dim"]:
    """Patch embeddings of some pictures, which must fit into memory together. Raises as `patch_batches`."""
    batch = collate([view[position] for position in positions])
    if batch.broken:
        broken = batch.broken[0]
        raise DataError(f"{broken.name}: {broken.reason}: evaluation needs every picture; mend or remove it")
    if batch.patch_embeds is not None:
        return batch.patch_embeds
    assert batch.pixel_values is not None
    return encoder(batch.pixel_values.to(next(encoder.parameters()).device))
