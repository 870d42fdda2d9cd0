"""One process of `unit/test_distributed.py`. A module of its own: a spawned process imports it by name."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qformers.distributed import process_offset
from qformers.objectives.itc import itc_loss, own_caption_matrix, same_image_matrix, similarities


def itc_gradients(image_features: Tensor, text_features: Tensor, image_ids: Tensor, use_image_ids: bool) -> dict:
    """ITC's loss over this process's rows, and its gradients."""
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = [image_features.clone().requires_grad_(), text_features.clone().requires_grad_(), temperature]
    same = (same_image_matrix if use_image_ids else own_caption_matrix)(image_ids)
    loss = itc_loss(*similarities(*inputs[:2]), temperature, same)
    gradients = torch.autograd.grad(loss, inputs)
    return dict(zip(["loss", "images", "texts", "temperature"], [loss.detach(), *gradients], strict=True))


def run(rank: int, processes: int, folder: Path, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Do this rank's share of `inputs` and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
    rows = len(inputs[0]) // processes
    mine = [tensor[process_offset(rows) : process_offset(rows) + rows] for tensor in inputs]
    torch.save([itc_gradients(*mine, use_image_ids=use) for use in (True, False)], folder / f"{rank}.pt")
    dist.destroy_process_group()
