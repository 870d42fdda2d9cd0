"""One stage-1 step's mathematics: ITC + ITM + ITG over one batch (BLIP-2, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qformers.data.batch import Batch
from qformers.distributed import process_offset
from qformers.models.stage1 import ImageEncoding, Stage1Model
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itc import itc_loss, own_caption_matrix, same_image_matrix, similarities
from qformers.objectives.itg import itg_loss
from qformers.objectives.itm import HardNegatives, itm_labels, itm_logits, itm_loss, sample_hard_negatives
from qformers.objectives.output import StepOutput, patch_embeds_of


@dataclass(frozen=True)
class _Contrast:
    """ITC of one batch, and the similarities and positives that ITM draws its negatives by."""

    loss: Float[Tensor, ""]
    sim_i2t: Float[Tensor, "batch columns"]
    sim_t2i: Float[Tensor, "batch columns"]
    positives: Bool[Tensor, "batch columns"]
    stats: dict[str, Float[Tensor, ""]]


class Stage1Objective(nn.Module):
    """The model with its three losses as one module: distributed wrappers then see one forward per step."""

    def __init__(self, model: Stage1Model, config: Stage1LossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.itc_alone = config.itc_steps > 0

    def forward(self, batch: Batch, negatives: HardNegatives | None = None) -> StepOutput:
        """Losses of a batch. `negatives` are drawn unless given (tests give them)."""
        model, config = self.model, self.config
        patches = patch_embeds_of(batch, model)
        if self.itc_alone and self.training:
            image = model.encode_image(patches)
            itc = self._itc(batch, image, model.encode_text(batch.input_ids, batch.attention_mask))
            return StepOutput(losses={"itc": itc.loss}, stats=itc.stats)
        packed = model.packed_pass(patches, batch.input_ids, batch.attention_mask)
        itc = self._itc(batch, packed.image, packed.text_features)
        if negatives is None:
            # Negatives come from this process's own rows: local columns of the global similarities.
            local = slice(process_offset(len(batch)), process_offset(len(batch)) + len(batch))
            negatives = sample_hard_negatives(
                itc.sim_i2t[:, local],
                itc.sim_t2i[:, local],
                model.temperature,
                itc.positives[:, local],
                config.hard_negative_fraction,
            ).first(math.ceil(config.itm_fraction * len(batch)))
        logits = itm_logits(model, packed.image, batch.input_ids, batch.attention_mask, negatives)
        labels = itm_labels(negatives)
        itm = itm_loss(logits, labels)

        itg = itg_loss(model, packed.generative_outputs, batch.input_ids, batch.attention_mask, config.label_smoothing)
        return StepOutput(
            losses={"itc": itc.loss, "itm": itm, "itg": itg},
            stats={**itc.stats, "itm_accuracy": itm_accuracy(logits, labels)},
        )

    def _itc(self, batch: Batch, image: ImageEncoding, text_features: Float[Tensor, "batch embed_dim"]) -> _Contrast:
        model, config = self.model, self.config
        sim_i2t, sim_t2i = similarities(image.image_features, text_features)
        positive_matrix = same_image_matrix if config.use_image_ids else own_caption_matrix
        positives = positive_matrix(batch.image_ids)
        loss = itc_loss(sim_i2t, sim_t2i, model.temperature, positives, config.label_smoothing)
        found = positives.gather(1, sim_i2t.argmax(dim=1, keepdim=True))
        stats = {
            "temperature": model.temperature.detach(),
            "itc_accuracy": found.float().mean(),
            "query_diversity": query_diversity(image.query_outputs),
        }
        return _Contrast(loss, sim_i2t, sim_t2i, positives, stats)

    def before_step(self, step: int) -> None:
        """Choose the losses of `step` (from 1); training calls it before every step."""
        self.itc_alone = step <= self.config.itc_steps

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature above `min_temperature`; training calls it after every optimiser step.

        The authors let it run free. At a large learning rate it then crosses zero, where ITC pulls apart what
        belongs together.
        """
        self.model.temperature.clamp_(min=self.config.min_temperature)


@torch.no_grad()
def query_diversity(query_outputs: Float[Tensor, "images queries dim"]) -> Float[Tensor, ""]:
    """The share (0–1) of the query outputs that differs between the queries of one image.

    Near 0 all queries say the same, and the Q-Former is worth one: it happens in short runs at large
    learning rates, and the losses do not show it.
    """
    outputs = query_outputs.detach().float()
    between = outputs - outputs.mean(dim=1, keepdim=True)
    return between.pow(2).mean() / outputs.pow(2).mean()


@torch.no_grad()
def itm_accuracy(logits: Float[Tensor, "pairs 2"], labels: Int[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """The share of ITM's pairs that are told right; always saying "no match" is right in two thirds."""
    counted = labels >= 0
    return ((logits.argmax(dim=1) == labels) & counted).sum() / counted.sum()
