"""Image-text matching with hard negatives (BLIP-2, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.data.batch import IGNORED_LABEL
from qformers.distributed import GlobalMean, fetch_rows, largest_over_processes, process_offset
from qformers.models.attention import ImageMemory
from qformers.models.stage1 import Stage1Model

Texts = tuple[Int[Tensor, "_rows _tokens"], Bool[Tensor, "_rows _tokens"]]
"""Ids and mask of some texts."""


@dataclass(frozen=True)
class HardNegatives:
    """For each of the first texts of a batch (usually all) one wrong image and for each image one wrong text.

    They are rows of the global batch. Where a row has no negative at all (one image fills the batch, or the batch
    has one row) `*_exists` is False and the index is the row itself; the loss leaves that pair out.
    """

    images: Int[Tensor, " scored"]
    texts: Int[Tensor, " scored"]
    image_exists: Bool[Tensor, " scored"]
    text_exists: Bool[Tensor, " scored"]

    def rows(self, some: slice) -> HardNegatives:
        """Those of some rows alone."""
        return HardNegatives(self.images[some], self.texts[some], self.image_exists[some], self.text_exists[some])

    @property
    def pairs(self) -> Int[Tensor, ""]:
        """How many pairs ITM scores with them: the positives, and the negatives that exist."""
        return len(self.images) + self.image_exists.sum() + self.text_exists.sum()


@torch.no_grad()
def sample_hard_negatives(
    sim_i2t: Float[Tensor, "batch global_batch"],
    sim_t2i: Float[Tensor, "batch global_batch"],
    temperature: Float[Tensor, ""],
    positives: Bool[Tensor, "batch global_batch"],
    draws: Float[Tensor, "2 batch"],
    hard_fraction: float = 1.0,
) -> HardNegatives:
    """Draw negatives in proportion to softmax(similarity / temperature), positives masked out.

    With `hard_fraction` below 1 that share of the probability is the softmax's and the rest is spread evenly over all
    negatives.

    Args:
        draws: even random numbers in [0, 1), which decide each row's image (first) and text.
    """
    images, image_exists = _draw(sim_t2i / temperature, positives, draws[0], hard_fraction)
    texts, text_exists = _draw(sim_i2t / temperature, positives, draws[1], hard_fraction)
    return HardNegatives(images, texts, image_exists, text_exists)


def _draw(
    scores: Float[Tensor, "batch global_batch"],
    positives: Bool[Tensor, "batch global_batch"],
    draws: Float[Tensor, " batch"],
    hard_fraction: float,
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    rows, columns = scores.shape
    exists = ~positives.all(dim=1)
    own = torch.arange(rows, device=scores.device) + process_offset(rows)
    itself = own[:, None] == torch.arange(columns, device=scores.device)[None, :]
    allowed = torch.where(exists[:, None], ~positives, itself)
    # A NaN must reach the loss, where training names it; it must not end in an error of the drawing.
    weights = scores.nan_to_num().masked_fill(~allowed, -torch.inf).softmax(dim=1)
    evenly = allowed / allowed.sum(dim=1, keepdim=True)
    cumulative = (hard_fraction * weights + (1 - hard_fraction) * evenly).cumsum(dim=1)
    # Rounding must lead to no other column: the whole is what an allowed one reaches, and the threshold is below it.
    whole = cumulative.masked_fill(~allowed, 0).amax(dim=1, keepdim=True)
    reached = (cumulative > draws.clamp(max=1 - 2**-23)[:, None] * whole) & allowed
    return reached.to(torch.uint8).argmax(dim=1), exists


def fetch_texts(texts: Texts, wanted: Int[Tensor, " wanted"]) -> Texts:
    """Chosen rows of the global batch, padded to the longest text of any process."""
    input_ids, attention_mask = texts
    missing = largest_over_processes(input_ids.shape[1], input_ids.device) - input_ids.shape[1]
    both = torch.stack([input_ids, attention_mask.to(input_ids.dtype)], dim=1)
    ids, mask = fetch_rows(F.pad(both, (0, missing)), wanted).unbind(1)
    return ids, mask.bool()


def itm_logits(
    model: Stage1Model, own: ImageMemory, own_texts: Texts, wrong: ImageMemory, wrong_texts: Texts
) -> Float[Tensor, "pairs 2"]:
    """Logits of 3 · scored pairs: positives, (text, negative image), (image, negative text).

    A positive and the pair of the same image with its negative text share the image's keys on the query axis.

    Args:
        own: the scored images.
        own_texts: the text of each.
        wrong: the negative image of each text.
        wrong_texts: the negative text of each image.
    """
    scored, longer = len(own_texts[0]), wrong_texts[0].shape[1] - own_texts[0].shape[1]
    pairs = []
    for mine, negative in zip(own_texts, wrong_texts, strict=True):
        mine, negative = F.pad(mine, (0, max(0, longer))), F.pad(negative, (0, max(0, -longer)))
        # Rows 2i and 2i + 1 read image i: its own text, then its negative text. The rest read negative images.
        pairs.append(torch.cat([torch.stack([mine, negative], dim=1).flatten(0, 1), mine]))
    logits = model.match_logits([own.shared_by(2), wrong], *pairs)
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


def itm_loss(
    logits: Float[Tensor, "pairs 2"], labels: Int[Tensor, " pairs"], over: GlobalMean | None = None
) -> Float[Tensor, ""]:
    """Binary cross-entropy over all pairs that exist.

    Args:
        over: the pairs that the mean is taken over; None: this call's, on all processes.
    """
    over = over or GlobalMean.over((labels != IGNORED_LABEL).sum())
    return over.share(F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"))
