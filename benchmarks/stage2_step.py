"""One stage-2 step, forward and backward, beside Hugging Face's `Blip2ForConditionalGeneration` on the same weights.

Both train the Q-Former and the projection through a frozen language model, from the same pixels, on captions of COCO's
length padded to the longest. Losses and gradients must agree before a clock is started.
"""

from __future__ import annotations

import torch
from full_size import COCO_TOKENS
from hugging_face import IMAGE_TOKEN, QUERIES, both_models, pictures
from measure import Result, alternate, flops, machine, peak_bytes, peak_fraction, saved_bytes
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.models.stage2 import Stage2Model
from qformers.objectives.lm import Stage2Objective
from qformers.training.loop import keep_freed_memory

REPETITIONS, START, WORDS = 3, 2, (1000, 50000)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative, as of stage 1


def run(rows: int) -> Result:
    """Checks that both agree, then times them in turn."""
    keep_freed_memory()
    theirs, ours = both_models()
    batch = captioned(rows)
    objective = Stage2Objective(ours)
    for part in (ours.qformer, ours.language_projection, theirs.qformer, theirs.language_projection):
        part.requires_grad_(True)
    theirs.query_tokens.requires_grad_(True)
    for unread in ours.text_branch():
        unread.requires_grad_(False)

    def own_loss() -> Tensor:
        return objective(batch).losses["lm"]

    def their_loss() -> Tensor:
        return hugging_face_loss(theirs, batch)

    def own() -> Tensor:
        return step(ours, own_loss())

    def peer() -> Tensor:
        return step(theirs, their_loss())

    compared = agree(ours, theirs, float(own() / peer() - 1))
    timed = alternate(own, peer, REPETITIONS)
    work, memory, their_memory = flops(own), saved_bytes(ours, own_loss), saved_bytes(theirs, their_loss)
    return {
        **timed,
        "memory_ratio": memory / their_memory,
        "saved_bytes": {"ours": memory, "peer": their_memory},
        "peak_bytes": {"ours": peak_bytes(own), "peer": peak_bytes(peer)},
        "flops": work,
        "peer_flops": flops(peer),
        "peak_fraction": peak_fraction(work, timed["cpu_seconds"]["ours"], torch.float32),
        "agreement": compared,
        "batch": rows,
        "images_per_second": rows / timed["seconds"]["ours"],
        **machine(torch.float32),
    }


def captioned(rows: int) -> Batch:
    """Pictures with captions as our loader gives them for a decoder-only language model."""
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(*COCO_TOKENS, (rows,), generator=draw)
    longest = int(lengths.max())
    input_ids = torch.randint(*WORDS, (rows, longest), generator=draw)
    input_ids[:, 0] = START
    attention_mask = torch.arange(longest)[None, :] < lengths[:, None]
    labels = input_ids.masked_fill(~attention_mask, IGNORED_LABEL)
    labels[:, 0] = IGNORED_LABEL
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        image_ids=torch.arange(rows),
        names=tuple(str(row) for row in range(rows)),
        pixel_values=pictures(rows),
    )


def hugging_face_loss(model: Blip2ForConditionalGeneration, batch: Batch) -> Tensor:
    """Theirs, whose text has a place for each visual prompt in front."""
    rows = len(batch)
    assert batch.labels is not None
    places = torch.full((rows, QUERIES), IMAGE_TOKEN)
    seen = torch.ones(rows, QUERIES, dtype=torch.long)
    return model(
        pixel_values=batch.pixel_values,
        input_ids=torch.cat([places, batch.input_ids], dim=1),
        attention_mask=torch.cat([seen, batch.attention_mask.long()], dim=1),
        labels=torch.cat([torch.full_like(places, IGNORED_LABEL), batch.labels], dim=1),
    ).loss


def step(model: nn.Module, loss: Tensor) -> Tensor:
    """The backward pass, from no gradients to all."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


def agree(ours: Stage2Model, theirs: Blip2ForConditionalGeneration, loss_apart: float) -> dict[str, float]:
    """How far losses and the gradients of what both hold alike are apart. Ends the benchmark where it is too far."""
    pairs = [
        (ours.qformer.query_tokens, theirs.query_tokens),
        (ours.language_projection.weight, theirs.language_projection.weight),
    ]
    apart = {"loss": abs(loss_apart)}
    for name, (own, other) in zip(("query_tokens", "language_projection"), pairs, strict=True):
        assert own.grad is not None and other.grad is not None
        apart[name] = float((own.grad.flatten() - other.grad.flatten()).norm() / other.grad.norm())
    for name, distance in apart.items():
        if distance > (limit := LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE):
            raise SystemExit(f"{name} differs by {distance}, the limit is {limit}")
    return apart
