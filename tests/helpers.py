"""Tiny models and batches that several test files build on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qformers.data.batch import Batch
from qformers.models.config import ModelConfig
from qformers.models.presets import build_stage1
from qformers.models.stage1 import Stage1Model
from qformers.models.vision import VisionEncoder
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.stage1 import Stage1Objective

VISION_DIM = 24
PATCHES = 5
VOCAB_SIZE = 50  # the last id is [DEC]
PAD, CLS, SEP = 0, 1, 2
FIRST_WORD = 3


class GivenPatches(VisionEncoder):
    """Stands where the frozen encoder would: these tests give the patch embeddings themselves."""

    def __init__(self, dim: int) -> None:
        nn.Module.__init__(self)
        self.dim = dim


def tiny_stage1(seed: int = 0, vision_dim: int = VISION_DIM, **settings) -> Stage1Model:
    """The `tiny` preset without dropout, every parameter random and large enough to matter."""
    torch.manual_seed(seed)
    chosen = {"num_queries": 4, "embed_dim": 16, "dropout": 0.0, "attention_dropout": 0.0, **settings}
    config = ModelConfig(preset="tiny", start_from_text_encoder=False, **chosen)
    model = build_stage1(config, VOCAB_SIZE, GivenPatches(vision_dim))
    randomise(model)
    return model


@torch.no_grad()
def randomise(module: nn.Module, std: float = 0.3) -> None:
    """Weights that make attention sharp and every bias and norm count; fresh ones hide mistakes."""
    for name, parameter in module.named_parameters():
        if name.endswith("temperature"):
            continue
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=std if parameter.dim() > 1 else 0.1)


def random_texts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """`[CLS] words [SEP]` of these lengths (specials included), padded to the longest: ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        input_ids[row, 0] = CLS
        input_ids[row, 1 : length - 1] = torch.randint(FIRST_WORD, VOCAB_SIZE - 1, (length - 2,), generator=generator)
        input_ids[row, length - 1] = SEP
    return input_ids, torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def random_batch(
    lengths: list[int], image_ids: list[int] | None = None, seed: int = 0, vision_dim: int = VISION_DIM
) -> Batch:
    """A random picture (as float64 patch embeddings) and caption per length; equal ids share the picture."""
    image_ids = list(range(len(lengths))) if image_ids is None else image_ids
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(max(image_ids) + 1, PATCHES, vision_dim, generator=generator, dtype=torch.float64)
    input_ids, attention_mask = random_texts(lengths, seed)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_ids=torch.tensor(image_ids),
        names=tuple(f"row {row}" for row in range(len(lengths))),
        patch_embeds=2 * pictures[image_ids] + 0.5,
    )


def objective(model: Stage1Model, label_smoothing: float = 0.1, use_image_ids: bool = True) -> Stage1Objective:
    """The model with its three losses."""
    return Stage1Objective(model, Stage1LossConfig(label_smoothing=label_smoothing, use_image_ids=use_image_ids))
