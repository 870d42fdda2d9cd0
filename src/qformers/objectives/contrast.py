"""ITC of a whole batch with what follows from it: whom ITM contrasts, and how well it goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.distributed import process_offset, world_size
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itc import itc_loss, own_caption_matrix, same_image_matrix, similarities
from qformers.objectives.itm import HardNegatives, sample_hard_negatives


@dataclass(frozen=True)
class Contrast:
    """ITC of this process's rows against the global batch. `accuracy`: whose most similar text is their image's."""

    loss: Float[Tensor, ""]
    sim_i2t: Float[Tensor, "batch global_batch"]
    sim_t2i: Float[Tensor, "batch global_batch"]
    positives: Bool[Tensor, "batch global_batch"]
    accuracy: Float[Tensor, ""]


def contrast(
    image_features: Float[Tensor, "batch queries embed_dim"],
    text_features: Float[Tensor, "batch embed_dim"],
    temperature: Float[Tensor, ""],
    image_ids: Int[Tensor, " batch"],
    config: Stage1LossConfig,
) -> Contrast:
    """ITC over the batch of all processes; every process holds as many rows."""
    sim_i2t, sim_t2i = similarities(image_features, text_features)
    positives = (same_image_matrix if config.use_image_ids else own_caption_matrix)(image_ids)
    loss = itc_loss(sim_i2t, sim_t2i, temperature, positives, config.label_smoothing)
    found = positives.gather(1, sim_i2t.argmax(dim=1, keepdim=True))
    return Contrast(loss, sim_i2t, sim_t2i, positives, found.float().mean())


def draw_negatives(
    itc: Contrast, temperature: Float[Tensor, ""], draws: torch.Generator, config: Stage1LossConfig
) -> HardNegatives:
    """ITM's negatives of this process's rows, drawn from the global batch.

    Every process draws the numbers of all rows and uses its own, so `draws`, of the same state everywhere, leads to the
    same negatives on any number of processes.
    """
    rows = len(itc.sim_i2t)
    numbers = torch.rand(2, rows * world_size(), generator=draws)[:, process_offset(rows) :][:, :rows]
    return sample_hard_negatives(
        itc.sim_i2t,
        itc.sim_t2i,
        temperature,
        itc.positives,
        numbers.to(itc.sim_i2t.device, non_blocking=True),
        config.hard_negative_fraction,
    )
