"""Language modelling of answers, the question read by the queries too (BLIP-2, section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.distributed import GlobalMean
from qformers.models.reader import at_least_fp32
from qformers.models.stage2 import Stage2Model
from qformers.objectives.output import Drawing, StepOutput, count_passes, patch_embeds_of, row_slices


class AnswerObjective(nn.Module):
    """The model with its loss as one module: distributed wrappers then see one forward per step."""

    def __init__(self, model: Stage2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, over: GlobalMean | None = None) -> StepOutput:
        """Cross-entropy of the answers' tokens, each answer's weighted by the share of people who gave it.

        The visual prompts of a question are made once and read by all of its answers. With one answer a question this
        is the mean over target tokens, as `objectives.lm` has it.

        Args:
            over: the weights of the tokens that the mean is taken over; None: those of this call, on all processes.
        """
        model, answers = self.model, batch.answers
        assert answers is not None, "a batch of questions carries answers"
        instructions = (batch.input_ids, batch.attention_mask) if model.reads_instructions else None
        visual_prompts = model.visual_prompts(patch_embeds_of(batch, model), instructions)
        target_mask = answers.labels != IGNORED_LABEL
        logits = model.language_model(
            visual_prompts[answers.rows],
            answers.input_ids,
            answers.attention_mask,
            answers.labels.masked_fill(~target_mask, 0),
            target_mask,
        )
        targets = answers.labels[target_mask]
        of_answer = target_mask.nonzero()[:, 0]
        weights = answers.weights[of_answer]
        over = over or GlobalMean.over(_mass(batch))
        loss = over.share((weights * F.cross_entropy(at_least_fp32(logits), targets, reduction="none")).sum())
        with torch.no_grad():
            right = (logits.argmax(dim=1) == targets).float()
            whole = torch.ones_like(answers.weights).scatter_reduce(0, of_answer, right, "amin")
            stats = {
                "token_accuracy": over.share((weights * right).sum()),
                # Every token right, given the right ones before it: of one answer a question, what greedy would say.
                "answer_accuracy": (answers.weights * whole).sum() / answers.weights.sum(),
                "tokens_per_image": target_mask.sum() / len(batch),
            }
        return StepOutput(losses={"lm": loss}, stats=stats)

    def passes(self, batches: Sequence[Batch], micro_batch_size: int | None, drawing: Drawing) -> Iterator[tuple]:
        """The arguments of each forward pass of one step: micro-batches whose mean is that of all `batches` at once."""
        over = GlobalMean.over(
            torch.stack([_mass(batch) for batch in batches]).sum(), count_passes(batches, micro_batch_size)
        )
        for batch in batches:
            for rows in row_slices(len(batch), micro_batch_size):
                yield batch.rows(rows), over

    def before_step(self, step: int, seed: int) -> None:
        """Every step has the same loss, and draws nothing that processes must agree on."""

    def after_step(self) -> None:
        """Nothing has bounds here."""


def _mass(batch: Batch) -> Float[Tensor, ""]:
    """The weights of all target tokens together."""
    assert batch.answers is not None, "a batch of questions carries answers"
    return (batch.answers.weights * (batch.answers.labels != IGNORED_LABEL).sum(dim=1)).sum()
