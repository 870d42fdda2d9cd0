"""Image-text matching with hard negatives (BLIP-2, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.data.batch import IGNORED_LABEL
from qformers.models.stage1 import ImageEncoding, Stage1Model


@dataclass(frozen=True)
class HardNegatives:
    """For each of the first texts of a batch (usually all) one wrong image and for each image one wrong text, as rows.

    Where a row has no negative at all (one image fills the batch, or the batch has one row) `*_exists` is
    False and the index is the row itself; the loss leaves that pair out.
    """

    images: Int[Tensor, " scored"]
    texts: Int[Tensor, " scored"]
    image_exists: Bool[Tensor, " scored"]
    text_exists: Bool[Tensor, " scored"]

    def first(self, rows: int) -> HardNegatives:
        """Those of the first `rows` rows alone."""
        return HardNegatives(self.images[:rows], self.texts[:rows], self.image_exists[:rows], self.text_exists[:rows])


@torch.no_grad()
def sample_hard_negatives(
    sim_i2t: Float[Tensor, "batch batch"],
    sim_t2i: Float[Tensor, "batch batch"],
    temperature: Float[Tensor, ""],
    positives: Bool[Tensor, "batch batch"],
    hard_fraction: float = 1.0,
) -> HardNegatives:
    """Draw negatives in proportion to softmax(similarity / temperature), positives masked out.

    Images are drawn first, then texts, as the authors' code does. With `hard_fraction` below 1 that share of the
    probability is the softmax's and the rest is spread evenly over all negatives.
    """
    images, image_exists = _draw(sim_t2i / temperature, positives, hard_fraction)
    texts, text_exists = _draw(sim_i2t / temperature, positives, hard_fraction)
    return HardNegatives(images, texts, image_exists, text_exists)


def _draw(
    scores: Float[Tensor, "batch batch"], positives: Bool[Tensor, "batch batch"], hard_fraction: float
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    exists = ~positives.all(dim=1)
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    allowed = torch.where(exists[:, None], ~positives, itself)
    # A NaN must reach the loss, where training names it; multinomial would end the process (on a GPU, hard).
    weights = scores.nan_to_num().masked_fill(~allowed, -torch.inf).softmax(dim=1)
    evenly = allowed / allowed.sum(dim=1, keepdim=True)
    return torch.multinomial(hard_fraction * weights + (1 - hard_fraction) * evenly, 1)[:, 0], exists


def itm_logits(
    model: Stage1Model,
    image: ImageEncoding,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Bool[Tensor, "batch tokens"],
    negatives: HardNegatives,
) -> Float[Tensor, "pairs 2"]:
    """Logits of 3 · scored pairs: positives, (text, negative image), (image, negative text).

    A positive and the pair of the same image with its negative text share the image's keys on the query axis;
    only the negative images' keys are copied.
    """
    scored = len(negatives.images)
    own_texts = torch.arange(scored, device=input_ids.device)
    # Rows 2i and 2i + 1 read image i: its own text, then its negative text. The rest read negative images.
    rows = torch.cat([torch.stack([own_texts, negatives.texts], dim=1).flatten(), own_texts])
    memories = [image.memory.first(scored).shared_by(2), image.memory.select(negatives.images)]
    logits = model.match_logits(memories, input_ids[rows], attention_mask[rows])
    positive, negative_text = logits[: 2 * scored].unflatten(0, (scored, 2)).unbind(1)
    return torch.cat([positive, logits[2 * scored :], negative_text])


def itm_labels(negatives: HardNegatives) -> Int[Tensor, " pairs"]:
    """1 for the positives, 0 for the negatives, ignored where a negative does not exist."""
    negative = torch.zeros_like(negatives.images)
    return torch.cat(
        [
            torch.ones_like(negatives.images),
            negative.masked_fill(~negatives.image_exists, IGNORED_LABEL),
            negative.masked_fill(~negatives.text_exists, IGNORED_LABEL),
        ]
    )


def itm_loss(logits: Float[Tensor, "pairs 2"], labels: Int[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """Binary cross-entropy over all pairs that exist."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
