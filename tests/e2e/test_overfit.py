"""Stage 1 can learn: eight fixed pictures and captions by heart."""

from __future__ import annotations

import pytest
import torch
from helpers import CLS, PAD, SEP, objective, random_batch, randomise, tiny_stage1
from torch import Tensor

from qformers.data.batch import Batch
from qformers.models.stage1 import Stage1Model
from qformers.objectives.itc import max_over_queries
from qformers.objectives.output import StepOutput

STEPS, PEAK_LR, WARMUP_STEPS = 300, 5e-3, 30


@pytest.fixture(scope="module")
def trained() -> tuple[Stage1Model, Batch, StepOutput]:
    model = tiny_stage1()
    randomise(model, std=0.1)  # the usual 0.02 is meant for 768 wide; at 32 it starts ITM on a plateau
    batch = random_batch([6, 3, 9, 4, 5, 7, 8, 6])
    step = objective(model, label_smoothing=0.0)
    optimiser = torch.optim.AdamW(step.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for number in range(STEPS):
        rate = PEAK_LR * min(1, (number + 1) / WARMUP_STEPS, 2 * (STEPS - number) / STEPS)
        optimiser.param_groups[0]["lr"] = rate
        step(batch).total.backward()
        optimiser.step()
        optimiser.zero_grad()
        step.after_step()
    return model.eval(), batch, step(batch)


def test_losses_reach_their_floor(trained):
    """Without label smoothing, and with eight different pictures, the floor of all three is 0."""
    _, _, output = trained
    assert output.losses["itc"] < 0.01  # ln 8 = 2.08 for a guess
    assert output.losses["itm"] < 0.01  # 0.64 for a guess
    assert output.losses["itg"] < 0.02  # ln 50 = 3.9 for a guess
    assert output.stats["itm_accuracy"] == 1.0
    assert output.stats["itc_accuracy"] == 1.0


@torch.no_grad()
def test_every_caption_is_found_and_matched(trained):
    model, batch, _ = trained
    image = model.encode_image(batch.patch_embeds)
    similarity = max_over_queries(image.image_features, model.encode_text(batch.input_ids, batch.attention_mask))
    assert similarity.argmax(dim=0).tolist() == similarity.argmax(dim=1).tolist() == list(range(8))
    # All 64 pairs, so also those that training seldom drew as negatives.
    logits = model.match_logits(
        [image.memory.shared_by(8)], batch.input_ids.repeat(8, 1), batch.attention_mask.repeat(8, 1)
    )
    match = logits.softmax(dim=1)[:, 1].unflatten(0, (8, 8))
    assert match.argmax(dim=0).tolist() == match.argmax(dim=1).tolist() == list(range(8))
    assert match.diagonal().min() > 0.95


@torch.no_grad()
def test_greedy_decoding_writes_the_captions(trained):
    model, batch, _ = trained
    assert torch.equal(greedy(model, batch.patch_embeds, batch.input_ids.shape[1]), batch.input_ids)


def greedy(model: Stage1Model, patch_embeds: Tensor, max_tokens: int) -> Tensor:
    memory = model.encode_image(patch_embeds).memory
    input_ids = torch.full((len(patch_embeds), 1), CLS)
    ended = torch.zeros(len(patch_embeds), dtype=torch.bool)
    while input_ids.shape[1] < max_tokens:
        logits = model.next_token_logits(memory, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        following = torch.where(ended, PAD, logits[:, -1].argmax(dim=1))
        ended |= following == SEP
        input_ids = torch.cat([input_ids, following[:, None]], dim=1)
    return input_ids
