"""Hugging Face's BLIP-2 and ours on the same random weights: the peers of stage 2 and of captions.

Sizes: pictures of 257 patches of 1408, BLIP-2's Q-Former, and a language model of OPT-125m's shape. The image encoder
has ViT-g's width and 2 of its layers: both sides run the same one, and 39 would only hide what differs.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from qformers.convert.run import open_model
from qformers.models.stage2 import Stage2Model

QUERIES, IMAGE_TOKEN = 32, 50270
PROMPT = (2, 102, 1345, 9)  # four tokens, as "a photo of"
WIDER = 4.0


def both_models() -> tuple[Blip2ForConditionalGeneration, Stage2Model]:
    """Hugging Face's model, and ours read from what it saved, both frozen and in eval mode."""
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(num_hidden_layers=2),
        qformer_config=Blip2QFormerConfig(vocab_size=30523),
        text_config=OPTConfig(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    theirs = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    with torch.no_grad():
        # With fresh weights (query tokens are zero) all pictures would get one caption: larger ones let them through.
        theirs.query_tokens.normal_(std=0.02)
        theirs.language_projection.weight.normal_(std=0.2)
        for name, weight in theirs.named_parameters():
            if "crossattention" in name or "language_model.model.decoder.layers" in name:
                weight.mul_(WIDER)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = open_model(folder).model.eval().requires_grad_(False)
    assert isinstance(ours, Stage2Model)
    return theirs, ours


def pictures(batch: int) -> torch.Tensor:
    """Random pixels, the same each time."""
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
