"""Gradient caching: ITC over a batch of any size in the memory of a micro-batch (Gao et al., arXiv 2101.06983).

Features of all micro-batches are computed first, without graph. ITC over all of them gives the gradient with respect
to every feature. Then each micro-batch is computed again, with graph and with the same random numbers, and sends its
features' gradients on through the model: together exactly the gradient of the one big batch. ITM and ITG of a
micro-batch ride along in the second pass, with negatives from the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qformers.data.batch import Batch
from qformers.distributed import GlobalMean, fetch_rows
from qformers.models.stage1 import Stage1Model
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.contrast import Contrast, contrast
from qformers.objectives.itm import HardNegatives, fetch_texts
from qformers.objectives.output import patch_embeds_of

Features = tuple[Float[Tensor, "_rows _queries _embed_dim"], Float[Tensor, "_rows _embed_dim"]]


@dataclass(frozen=True)
class FetchedNegatives:
    """ITM's negatives of a micro-batch: row i of `rows` is the wrong picture and the wrong text of its row i."""

    chosen: HardNegatives
    rows: Batch
    over_pairs: GlobalMean


@dataclass(frozen=True)
class CachedContrast:
    """What ITC of the whole batch says to one micro-batch."""

    value: Float[Tensor, ""]
    image_gradient: Float[Tensor, "rows queries embed_dim"]
    text_gradient: Float[Tensor, "rows embed_dim"]
    temperature_gradient: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    negatives: FetchedNegatives | None = None

    def loss(self, features: Features, temperature: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The whole batch's ITC in value; in gradient, what the micro-batch's features contribute to it."""
        image_features, text_features = features
        carrier = (
            (image_features * self.image_gradient).sum()
            + (text_features * self.text_gradient).sum()
            + temperature * self.temperature_gradient
        )
        return self.value + (carrier - carrier.detach())


def cached_contrasts(
    features: Sequence[Features],
    temperature: Float[Tensor, ""],
    image_ids: Int[Tensor, " batch"],
    config: Stage1LossConfig,
    weight: float,
) -> tuple[Contrast, list[CachedContrast]]:
    """ITC of the whole batch (of all processes), and what it says to each micro-batch.

    Args:
        features: of this process's micro-batches in order, without graph.
        weight: factor of the gradients, which makes a mean over a step's passes of the sum over micro-batches.
    """
    with torch.enable_grad():
        images = torch.cat([image for image, _ in features]).requires_grad_()
        texts = torch.cat([text for _, text in features]).requires_grad_()
        alone = temperature.detach().clone().requires_grad_()
        whole = contrast(images, texts, alone, image_ids, config)
        gradients = torch.autograd.grad(whole.loss, (images, texts, alone))
    sizes = [len(text) for _, text in features]
    parts = zip(*((weight * gradient).split(sizes) for gradient in gradients[:2]), strict=True)
    value, share = whole.loss.detach(), weight * gradients[2] / len(sizes)
    return whole, [CachedContrast(value, image, text, share, whole.accuracy) for image, text in parts]


@torch.no_grad()
def with_patch_embeds(batch: Batch, slices: list[slice], model: Stage1Model) -> Batch:
    """`batch` with a frozen image encoder's output in place of its pixels, so that no later pass runs it again.

    An encoder that is trained is left to the passes: it has to run where its gradient is taken.
    """
    if batch.patch_embeds is not None or any(weights.requires_grad for weights in model.vision_encoder.parameters()):
        return batch
    encoded = torch.cat([patch_embeds_of(batch.rows(rows), model) for rows in slices])
    return replace(batch, pixel_values=None, patch_embeds=encoded)


def fetch_negatives(batch: Batch, chosen: Sequence[HardNegatives], weight: float) -> Iterator[FetchedNegatives]:
    """The `chosen` rows of each micro-batch in turn, fetched when it is due, so that only one's are held.

    Args:
        weight: as for `cached_contrasts`.
    """
    over_pairs = GlobalMean.over(torch.stack([part.pairs for part in chosen]).sum(), weight)
    for part in chosen:
        input_ids, attention_mask = fetch_texts((batch.input_ids, batch.attention_mask), part.texts)
        pixels, embeds = batch.pixel_values, batch.patch_embeds
        rows = Batch(
            input_ids,
            attention_mask,
            image_ids=part.images,
            names=(),
            pixel_values=None if pixels is None else fetch_rows(pixels, part.images),
            patch_embeds=None if embeds is None else fetch_rows(embeds, part.images),
        )
        yield FetchedNegatives(part, rows, over_pairs)
