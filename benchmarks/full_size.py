"""The sizes of BLIP-2 with random weights, and batches as COCO's captions make them: what the benchmarks measure on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from qformers.data.batch import Batch
from qformers.models.config import ModelConfig
from qformers.models.freezing import freeze
from qformers.models.presets import QFormerShape, build_stage1
from qformers.models.stage1 import Stage1Model
from qformers.models.vision import VisionEncoder
from qformers.objectives.itm import HardNegatives

VISION_DIM, PATCHES, VOCABULARY, PADDED_TOKENS = 1408, 257, 30523, 32
EIGHTH = QFormerShape(layers=12, dim=96, heads=12, ffn_dim=384)  # of the width, for a test of the work
COCO_TOKENS = (9, 15)  # of a caption, with [CLS] and [SEP]: from, and below


class GivenFeatures(VisionEncoder):
    """Where the frozen encoder would be: the benchmark starts from its output."""

    def __init__(self, dim: int = VISION_DIM) -> None:
        nn.Module.__init__(self)
        self.dim = dim


def vit_large() -> VisionEncoder:
    """CLIP ViT-L/14's shape, 23 of its 24 layers, random and frozen."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, patch_size=14
    )
    described = {"config": config.to_dict(), "layer": 23, "image_px": 224, "dtype": "float32"}
    encoder = VisionEncoder.from_description({**described, "mean": [0.0] * 3, "std": [1.0] * 3})
    freeze(encoder, "vision_encoder")
    return encoder


def stage1_model(
    encoder: VisionEncoder, shape: QFormerShape | None = None, vocabulary: int = VOCABULARY, num_queries: int = 32
) -> Stage1Model:
    """BLIP-2's stage-1 model over `encoder`. Without dropout, so that losses can be compared."""
    config = ModelConfig(start_from_text_encoder=False, dropout=0.0, attention_dropout=0.0, num_queries=num_queries)
    return build_stage1(config, vocabulary, encoder, shape)


def captions(
    rows: int, tokens: tuple[int, int] = COCO_TOKENS, padded: int = PADDED_TOKENS, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor]:
    """Random ids and their mask, padded as the authors' code pads."""
    lengths = torch.randint(*tokens, (rows,))
    input_ids = torch.randint(1000, vocabulary - 1, (rows, padded))
    return input_ids, torch.arange(padded)[None, :] < lengths[:, None]


def trimmed_batch(input_ids: Tensor, attention_mask: Tensor, features: Tensor | None, pixels: Tensor | None) -> Batch:
    """As our loader gives it: padded to the longest caption."""
    rows, longest = len(input_ids), int(attention_mask.sum(dim=1).max())
    return Batch(
        input_ids=input_ids[:, :longest],
        attention_mask=attention_mask[:, :longest],
        image_ids=torch.arange(rows),
        names=tuple(str(row) for row in range(rows)),
        patch_embeds=features,
        pixel_values=pixels,
    )


def next_row_negatives(rows: int) -> HardNegatives:
    """Each row's negatives are its neighbour's: both sides score the same pairs."""
    shifted, exist = torch.arange(rows).roll(1), torch.ones(rows, dtype=torch.bool)
    return HardNegatives(images=shifted, texts=shifted, image_exists=exist, text_exists=exist)
