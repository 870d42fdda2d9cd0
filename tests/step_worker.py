"""One process of `unit/test_distributed.py`: the same steps as on one process, on this process's share of the rows.

A module of its own: a spawned process imports it by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import random_batch, randomise, tiny_stage1
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_language import toy_stage2

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.distributed import process_offset, rank, world_size
from qformers.models.vision import VisionEncoder
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itm import HardNegatives
from qformers.objectives.lm import Stage2Objective
from qformers.objectives.output import count_passes
from qformers.objectives.stage1 import Stage1Objective
from qformers.training.config import OptimiserConfig
from qformers.training.optimiser import build_optimiser

LENGTHS = [6, 3, 9, 4, 3, 7, 5, 8]  # so that no two processes have as many words
IMAGE_IDS = [0, 1, 2, 1, 3, 0, 4, 2]  # pairs of one image on different processes
NEGATIVE_IMAGES, NEGATIVE_TEXTS = [7, 7, 0, 5, 1, 2, 3, 4], [3, 4, 5, 6, 7, 6, 1, 0]
STEPS = 20

Results = dict[str, Tensor]


class PixelEncoder(VisionEncoder):
    """An image encoder that is trained, small enough to look at: patches are columns of the picture, projected."""

    def __init__(self, dim: int) -> None:
        nn.Module.__init__(self)
        self.dim = dim
        self.projection = nn.Linear(12, dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.tanh(self.projection(pixel_values.flatten(1, 2).transpose(1, 2)))


def share(batch: Batch) -> Batch:
    """This process's rows, padded to their own longest text as its loader would."""
    rows = len(batch) // world_size()
    mine = batch.rows(slice(process_offset(rows), process_offset(rows) + rows))
    tokens = int(mine.attention_mask.sum(dim=1).max())
    return replace(mine, input_ids=mine.input_ids[:, :tokens], attention_mask=mine.attention_mask[:, :tokens])


def stage1_batch(seed: int = 0) -> Batch:
    return random_batch(LENGTHS[seed:] + LENGTHS[:seed], IMAGE_IDS, seed)


def stage2_batch() -> Batch:
    """Captions of unequal lengths for GPT-2: words 4 … 23 of the toy vocabulary, the first one not to be said."""
    batch = random_batch(LENGTHS)
    input_ids = torch.where(batch.attention_mask, batch.input_ids % 20 + 4, 0)
    labels = torch.where(batch.attention_mask, input_ids, IGNORED_LABEL)
    labels[:, 0] = IGNORED_LABEL
    return replace(batch, input_ids=input_ids, labels=labels)


def share_with_labels(batch: Batch) -> Batch:
    mine = share(batch)
    assert mine.labels is not None
    return replace(mine, labels=mine.labels[:, : mine.input_ids.shape[1]])


@contextmanager
def drawing(number: int):
    """Every pass of every process has random numbers of its own."""
    torch.manual_seed(100 * rank() + number)
    yield


def step(objective: Stage1Objective | Stage2Objective, batches: list[Batch], micro_batch_size: int | None) -> Results:
    """The step's losses and gradients as this process sees them, before processes average."""
    objective.before_step(1, seed=5)
    count = count_passes(batches, micro_batch_size)
    results: Results = {}
    for number, arguments in enumerate(objective.passes(batches, micro_batch_size, drawing)):
        with drawing(number):
            output = objective(*arguments)
        (output.total / count).backward()
        for name, loss in output.losses.items():
            results[name] = results.get(name, 0) + loss.detach() / count
    gradients = {name: weights.grad for name, weights in objective.named_parameters() if weights.grad is not None}
    return {**results, **gradients}


def given_negatives(dtype: torch.dtype) -> Results:
    exists = torch.ones(len(LENGTHS), dtype=torch.bool)
    negatives = HardNegatives(torch.tensor(NEGATIVE_IMAGES), torch.tensor(NEGATIVE_TEXTS), exists, exists)
    model = tiny_stage1()
    if dtype == torch.float32:
        # The others' attention is so sharp that one process alone loses 1e-5 in fp32, and the gradient of the
        # temperature is rounding over its square.
        randomise(model, std=0.05)
        model.temperature.data.fill_(0.5)
    objective = Stage1Objective(model.to(dtype), Stage1LossConfig())
    whole = stage1_batch()
    batch = share(replace(whole, patch_embeds=whole.patch_embeds.to(dtype)))
    first = process_offset(len(batch))
    output = objective(batch, negatives.rows(slice(first, first + len(batch))))
    output.total.backward()
    return {**output.losses, **{name: weights.grad for name, weights in objective.named_parameters()}}


def stage1(micro_batch_size: int | None = None, seeds: tuple[int, ...] = (0,), **settings) -> Results:
    objective = Stage1Objective(tiny_stage1().double(), Stage1LossConfig(**settings)).train()
    return step(objective, [share(stage1_batch(seed)) for seed in seeds], micro_batch_size)


def trained_encoder(micro_batch_size: int | None = None) -> Results:
    model = tiny_stage1().double()
    torch.manual_seed(1)
    model.vision_encoder = PixelEncoder(24).double()
    batch = stage1_batch()
    pixel_values = torch.randn(len(batch), 3, 4, 5, dtype=torch.float64)
    batch = replace(batch, pixel_values=pixel_values, patch_embeds=None)
    return step(Stage1Objective(model, Stage1LossConfig()), [share(batch)], micro_batch_size)


def stage2(micro_batch_size: int | None = None) -> Results:
    objective = Stage2Objective(toy_stage2("gpt2").double())
    return step(objective, [share_with_labels(stage2_batch())], micro_batch_size)


def weights_after_steps() -> Results:
    """What 20 steps of AdamW, with gradients averaged by DistributedDataParallel, make of the weights."""
    objective = Stage1Objective(tiny_stage1().double(), Stage1LossConfig()).train()
    wrapped = objective if world_size() == 1 else DistributedDataParallel(objective)
    optimiser = build_optimiser(objective.model, OptimiserConfig(lr=1e-3))
    for number in range(1, STEPS + 1):
        objective.before_step(number, seed=number)
        arguments = next(objective.passes([share(stage1_batch(number % 8))], None, drawing))
        wrapped(*arguments).total.backward()
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step()
    return {name: weights.detach() for name, weights in objective.named_parameters()}


CASES: dict[str, Callable[[], Results]] = {
    "given_negatives_fp64": lambda: given_negatives(torch.float64),
    "given_negatives_fp32": lambda: given_negatives(torch.float32),
    "drawn": stage1,
    "captions_apart": lambda: stage1(use_image_ids=False),
    "some_drawn_evenly": lambda: stage1(hard_negative_fraction=0.5),
    "accumulated": lambda: stage1(seeds=(0, 3)),
    "cached_1": lambda: stage1(1),
    "cached_2": lambda: stage1(2),
    "cached_accumulated": lambda: stage1(1, seeds=(0, 3)),
    "cached_itc_alone": lambda: stage1(1, itc_steps=1),
    "trained_encoder": trained_encoder,
    "trained_encoder_cached": lambda: trained_encoder(1),
    "stage2": stage2,
    "stage2_micro": lambda: stage2(1),
    "weights_after_steps": weights_after_steps,
}
SAME_AS = {"cached_1": "drawn", "cached_2": "drawn", "cached_accumulated": "accumulated", "stage2_micro": "stage2",
           "trained_encoder_cached": "trained_encoder"}  # fmt: skip


def run(rank: int, processes: int, folder: Path) -> None:
    """Do this rank's share of every case and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
    torch.save({name: case() for name, case in CASES.items()}, folder / f"{rank}.pt")
    dist.barrier()
    time.sleep(0.2)  # destroying the group holds the interpreter, which gloo's threads need to free their last work
    dist.destroy_process_group()
