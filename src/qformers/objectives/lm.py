"""Language modelling through a frozen language model (BLIP-2, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.models.reader import at_least_fp32
from qformers.models.stage2 import Stage2Model
from qformers.objectives.output import StepOutput, patch_embeds_of


def lm_loss(logits: Float[Tensor, "targets vocabulary"], targets: Int[Tensor, " targets"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over all target tokens of the batch, as Hugging Face's models compute theirs."""
    return F.cross_entropy(at_least_fp32(logits), targets)


class Stage2Objective(nn.Module):
    """The model with its loss as one module: distributed wrappers then see one forward per step."""

    def __init__(self, model: Stage2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> StepOutput:
        """The loss over what the captions' labels say; nothing over visual prompts, prompt or padding."""
        model, labels = self.model, batch.labels
        assert labels is not None, "a batch of stage 2 carries labels"
        target_mask = labels != IGNORED_LABEL
        target_ids = labels.masked_fill(~target_mask, 0)
        logits = model.language_model(
            model.visual_prompts(patch_embeds_of(batch, model)),
            batch.input_ids,
            batch.attention_mask,
            target_ids,
            target_mask,
        )
        targets = labels[target_mask]
        loss = lm_loss(logits, targets)
        with torch.no_grad():
            stats = {
                "token_accuracy": (logits.argmax(dim=1) == targets).float().mean(),
                "tokens_per_image": target_mask.sum() / len(batch),
            }
        return StepOutput(losses={"lm": loss}, stats=stats)

    def before_step(self, step: int) -> None:
        """Every step has the same loss."""

    def after_step(self) -> None:
        """Nothing has bounds here."""
