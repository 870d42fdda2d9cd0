"""Captions beside those of Hugging Face's `Blip2ForConditionalGeneration.generate`: same weights, same tokens."""

from __future__ import annotations

from functools import partial

import torch
from hugging_face import IMAGE_TOKEN, PROMPT, QUERIES, both_models, pictures
from measure import Result, alternate, flops, machine, peak_bytes
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from qformers.models.config import GenerationSettings
from qformers.models.stage2 import Stage2Model
from qformers.training.loop import keep_freed_memory

NEW_TOKENS, REPETITIONS = 12, 9  # as long as COCO's captions; equal work needs many rounds to be told apart
CASES = {
    "captioning_greedy_1": (1, 1),
    "captioning_greedy_16": (16, 1),
    "captioning_beam5_1": (1, 5),
    "captioning_beam5_16": (16, 5),
}


def run(batch: int, beams: int) -> Result:
    """Checks that both say the same, then times them in turn."""
    keep_freed_memory()
    theirs, ours = both_models()
    pixels = pictures(batch)
    own, peer = partial(own_captions, ours, pixels, beams), partial(their_captions, theirs, pixels, beams)
    mine, other = own(), peer()
    differ = (mine != other).any(dim=1).nonzero()[:, 0]
    if len(differ):
        same_in_float64(ours, theirs, pixels[differ], beams)
    timed = alternate(own, peer, REPETITIONS, warm_up=0)
    return {
        **timed,
        "memory_ratio": peak_bytes(own) / peak_bytes(peer),
        "flops": flops(own),
        "peer_flops": flops(peer),
        "captions_that_differ": len(differ),  # by rounding: in float64 they are the same
        "distinct_captions": len(mine.unique(dim=0)),
        "captions_per_second": batch / timed["seconds"]["ours"],
        "batch": batch,
        "beams": beams,
        "new_tokens": NEW_TOKENS,
        **machine(torch.float32),
    }


@torch.inference_mode()
def own_captions(model: Stage2Model, pixels: Tensor, beams: int) -> Tensor:
    """Ids of ours, from pixels."""
    ids = torch.tensor([PROMPT]).expand(len(pixels), -1)
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_beams=beams)
    visual = model.visual_prompts(model.vision_encoder(pixels))
    return model.language_model.generate(visual, ids, torch.ones_like(ids, dtype=torch.bool), settings)


@torch.inference_mode()
def their_captions(model: Blip2ForConditionalGeneration, pixels: Tensor, beams: int) -> Tensor:
    """Ids of Hugging Face's, from the same pixels."""
    ids = torch.tensor([(IMAGE_TOKEN,) * QUERIES + PROMPT]).expand(len(pixels), -1)
    said = model.generate(
        pixels,
        ids,
        torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        num_beams=beams,
        do_sample=False,
    )
    return said[:, -NEW_TOKENS:]


def same_in_float64(ours: Stage2Model, theirs: Blip2ForConditionalGeneration, pixels: Tensor, beams: int) -> None:
    """Ends the benchmark where captions differ by more than rounding, which may drop a beam as likely as another."""
    ours.double(), theirs.double()
    mine, other = own_captions(ours, pixels.double(), beams), their_captions(theirs, pixels.double(), beams)
    ours.float(), theirs.float()
    if not torch.equal(mine, other):
        raise SystemExit(f"of {len(pixels)} captions that differ some differ in float64 too")
