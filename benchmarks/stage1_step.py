"""One stage-1 step, forward and backward, on given frozen features: ours against the plain authors' step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from plain_stage1 import plain_losses
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qformers.data.batch import Batch
from qformers.models.config import ModelConfig
from qformers.models.presets import build_stage1
from qformers.models.vision import VisionEncoder
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itm import HardNegatives
from qformers.objectives.stage1 import Stage1Objective

VISION_DIM, PATCHES, VOCABULARY, PADDED_TOKENS = 1408, 257, 30523, 32
BATCH, REPETITIONS = 8, 3
TOLERANCE = 1e-4  # relative, in fp32: both add up the same numbers in another order


class GivenFeatures(VisionEncoder):
    """Where the frozen encoder would be: the benchmark starts from its output."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.dim = VISION_DIM


def run() -> dict[str, object]:
    """Times both in turn on the same weights, batch and negatives, and compares their losses."""
    torch.manual_seed(0)
    config = ModelConfig(start_from_text_encoder=False, dropout=0.0, attention_dropout=0.0)
    model = build_stage1(config, VOCABULARY, GivenFeatures())
    objective = Stage1Objective(model, Stage1LossConfig())
    lengths = torch.randint(9, 15, (BATCH,))  # COCO captions, with [CLS] and [SEP]
    padded_ids = torch.randint(1000, VOCABULARY - 1, (BATCH, PADDED_TOKENS))
    padded_mask = torch.arange(PADDED_TOKENS)[None, :] < lengths[:, None]
    trimmed = int(lengths.max())
    patches = torch.randn(BATCH, PATCHES, VISION_DIM)
    batch = Batch(
        input_ids=padded_ids[:, :trimmed],
        attention_mask=padded_mask[:, :trimmed],
        image_ids=torch.arange(BATCH),
        names=tuple(str(row) for row in range(BATCH)),
        patch_embeds=patches,
    )
    shifted = torch.arange(BATCH).roll(1)
    exist = torch.ones(BATCH, dtype=torch.bool)
    negatives = HardNegatives(images=shifted, texts=shifted, image_exists=exist, text_exists=exist)

    def ours() -> dict[str, Tensor]:
        return objective(batch, negatives).losses

    def plain() -> dict[str, Tensor]:
        return plain_losses(model, patches, padded_ids, padded_mask, negatives)

    mine, theirs = ours(), plain()
    for name, loss in theirs.items():
        if abs(mine[name].item() / loss.item() - 1) > TOLERANCE:
            raise SystemExit(f"{name} differs: ours {mine[name].item()}, plain {loss.item()}")
    times = [(step_seconds(model, ours), step_seconds(model, plain)) for _ in range(REPETITIONS + 1)][1:]
    ratios = [peer / own for own, peer in times]
    return {
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "seconds": {"ours": median(own for own, _ in times), "plain": median(peer for _, peer in times)},
        "memory_ratio": saved_bytes(model, ours) / saved_bytes(model, plain),
        "flops": {"ours": flops(ours), "plain": flops(plain)},
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dtype": "float32",
    }


def step_seconds(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    sum(losses().values()).backward()
    return time.perf_counter() - start


def saved_bytes(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once and without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses()
    return sum(storages.values())


def flops(losses: Callable[[], dict[str, Tensor]]) -> int:
    """Products and sums of the forward pass, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        losses()
    return counter.get_total_flops()
