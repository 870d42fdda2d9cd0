"""Language modelling through a frozen language model (BLIP-2, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.distributed import GlobalMean
from qformers.models.reader import at_least_fp32
from qformers.models.stage2 import Stage2Model
from qformers.objectives.output import Drawing, StepOutput, count_passes, patch_embeds_of, row_slices


def lm_loss(
    logits: Float[Tensor, "targets vocabulary"], targets: Int[Tensor, " targets"], over: GlobalMean
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the target tokens, as Hugging Face's models compute theirs; `over` says over which."""
    return over.share(F.cross_entropy(at_least_fp32(logits), targets, reduction="sum"))


class Stage2Objective(nn.Module):
    """The model with its loss as one module: distributed wrappers then see one forward per step."""

    def __init__(self, model: Stage2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, over: GlobalMean | None = None) -> StepOutput:
        """The loss over what the captions' labels say; nothing over visual prompts, prompt or padding.

        Args:
            over: the tokens that the mean is taken over; None: the labels of this call, on all processes.
        """
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
        over = over or GlobalMean.over(_targets(batch))
        loss = lm_loss(logits, targets, over)
        with torch.no_grad():
            stats = {
                "token_accuracy": over.share((logits.argmax(dim=1) == targets).sum().float()),
                "tokens_per_image": target_mask.sum() / len(batch),
            }
        return StepOutput(losses={"lm": loss}, stats=stats)

    def passes(self, batches: Sequence[Batch], micro_batch_size: int | None, drawing: Drawing) -> Iterator[tuple]:
        """The arguments of each forward pass of one step: micro-batches whose mean is that of all `batches` at once."""
        over = GlobalMean.over(
            torch.stack([_targets(batch) for batch in batches]).sum(), count_passes(batches, micro_batch_size)
        )
        for batch in batches:
            for rows in row_slices(len(batch), micro_batch_size):
                yield batch.rows(rows), over

    def before_step(self, step: int, seed: int) -> None:
        """Every step has the same loss, and draws nothing that processes must agree on."""

    def after_step(self) -> None:
        """Nothing has bounds here."""


def _targets(batch: Batch) -> Int[Tensor, ""]:
    assert batch.labels is not None, "a batch of stage 2 carries labels"
    return (batch.labels != IGNORED_LABEL).sum()
