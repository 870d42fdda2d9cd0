"""One stage-1 step's mathematics: ITC + ITM + ITG over one batch (BLIP-2, section 3.1)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qformers.data.batch import Batch
from qformers.distributed import process_offset
from qformers.models.stage1 import Stage1Model
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itc import itc_loss, own_caption_matrix, same_image_matrix, similarities
from qformers.objectives.itg import itg_loss
from qformers.objectives.itm import HardNegatives, itm_labels, itm_logits, itm_loss, sample_hard_negatives
from qformers.objectives.output import StepOutput, patch_embeds_of


class Stage1Objective(nn.Module):
    """The model with its three losses as one module: distributed wrappers then see one forward per step."""

    def __init__(self, model: Stage1Model, config: Stage1LossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, batch: Batch, negatives: HardNegatives | None = None) -> StepOutput:
        """Losses of a batch. `negatives` are drawn unless given (tests give them)."""
        model, config = self.model, self.config
        packed = model.packed_pass(patch_embeds_of(batch, model), batch.input_ids, batch.attention_mask)

        sim_i2t, sim_t2i = similarities(packed.image.image_features, packed.text_features)
        positive_matrix = same_image_matrix if config.use_image_ids else own_caption_matrix
        positives = positive_matrix(batch.image_ids)
        itc = itc_loss(sim_i2t, sim_t2i, model.temperature, positives, config.label_smoothing)

        if negatives is None:
            # Negatives come from this process's own rows: local columns of the global similarities.
            local = slice(process_offset(len(batch)), process_offset(len(batch)) + len(batch))
            negatives = sample_hard_negatives(
                sim_i2t[:, local],
                sim_t2i[:, local],
                model.temperature,
                positives[:, local],
                config.hard_negative_fraction,
            ).first(math.ceil(config.itm_fraction * len(batch)))
        logits = itm_logits(model, packed.image, batch.input_ids, batch.attention_mask, negatives)
        labels = itm_labels(negatives)
        itm = itm_loss(logits, labels)

        itg = itg_loss(model, packed.generative_outputs, batch.input_ids, batch.attention_mask, config.label_smoothing)
        return StepOutput(
            losses={"itc": itc, "itm": itm, "itg": itg},
            stats={
                **_stats(model, sim_i2t, positives, logits, labels),
                "query_diversity": query_diversity(packed.image.query_outputs),
            },
        )

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
def _stats(model: Stage1Model, sim_i2t: Tensor, positives: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    counted = labels >= 0
    correct = (logits.argmax(dim=1) == labels) & counted
    found = positives.gather(1, sim_i2t.argmax(dim=1, keepdim=True))
    return {
        "temperature": model.temperature.detach(),
        "itm_accuracy": correct.sum() / counted.sum(),
        "itc_accuracy": found.float().mean(),
    }
