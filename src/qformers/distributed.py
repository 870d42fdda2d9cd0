"""Processes: who am I, and features gathered from all with their gradients. The identity on one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Number of processes; 1 when torch.distributed is not running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def process_offset(local_rows: int) -> int:
    """Where this process's rows begin in the gathered batch (every process holds `local_rows`)."""
    return rank() * local_rows


def gather_with_gradient(local: Tensor) -> Tensor:
    """Rows of every process, in rank order; gradients flow back to the process that owns the row.

    On one process, `local` itself.
    """
    return local if world_size() == 1 else _Gather.apply(local)


class _Gather(torch.autograd.Function):
    """torch's own differentiable `all_gather` mixes up the elements of a gradient that is not contiguous."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        local = local.contiguous()
        gathered = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(gathered, local)
        return torch.cat(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Every process's loss reads every row, so a row's gradient is the sum of what all of them send back.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        first = process_offset(ctx.rows)
        return total[first : first + ctx.rows]
