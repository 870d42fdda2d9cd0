"""Processes: who am I, and rows, counts and features that cross between them. The identity on one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
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


@dataclass(frozen=True)
class GlobalMean:
    """A mean over the targets of all processes, and of all forward passes that make up one step.

    Processes and passes may hold unequally many targets (words of captions), so a mean of means would be another
    number. Each pass contributes `share(sum over its own targets)`; the mean of these over passes and processes, which
    is how data-parallel training and accumulation average gradients, is the mean over all targets.
    """

    total: Int[Tensor, ""] | Float[Tensor, ""]
    passes: float  # on all processes together

    @classmethod
    def over(cls, count: Int[Tensor, ""] | Float[Tensor, ""], passes: float = 1) -> GlobalMean:
        """Of `count` targets (or weights of targets) on this process, met in `passes` forward passes."""
        total = count.detach().clone()
        if world_size() > 1:
            dist.all_reduce(total)
        return cls(total, passes * world_size())

    def share(self, summed: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What a pass with this sum over its targets contributes."""
        return summed * self.passes / self.total


def largest_over_processes(length: int, device: torch.device) -> int:
    """The largest of the processes' numbers. Waits for the device."""
    if world_size() == 1:
        return length
    largest = torch.tensor(length, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def gather_with_gradient(local: Tensor) -> Tensor:
    """Rows of every process, in rank order; gradients flow back to the process that owns the row.

    On one process, `local` itself.
    """
    return local if world_size() == 1 else _Gather.apply(local)


def fetch_rows(local: Shaped[Tensor, "rows ..."], wanted: Int[Tensor, " wanted"]) -> Shaped[Tensor, "wanted ..."]:
    """Chosen rows of the gathered batch; only they move between processes, and their gradients move back.

    Args:
        local: this process's rows; every process holds as many.
        wanted: rows of the gathered batch, any number of times each; every process wants as many.
    """
    if world_size() == 1:
        return local.index_select(0, wanted)
    return _Fetch.apply(local, _Route.plan(wanted, len(local)))


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


@dataclass(frozen=True)
class _Route:
    """Who sends which rows to whom, so that this process has the rows that it wants.

    `order` sorts the wanted rows by the process that holds them, which is how they arrive.
    """

    sent: Int[Tensor, " sent"]
    sent_to: list[int]
    received_from: list[int]
    order: Int[Tensor, " wanted"]

    @classmethod
    def plan(cls, wanted: Int[Tensor, " wanted"], rows: int) -> _Route:
        everyones = [torch.empty_like(wanted) for _ in range(world_size())]
        dist.all_gather(everyones, wanted.contiguous())
        wishes = torch.stack(everyones)
        holders = wishes // rows
        mine = holders == rank()
        # The sizes of what is sent must be known on the host: this waits for the device.
        counts = torch.stack([mine.sum(dim=1), torch.bincount(holders[rank()], minlength=world_size())]).tolist()
        # Row by row of `wishes`, so in the order of the processes, each one's in the order of its wish.
        sent = wishes[mine] - process_offset(rows)
        return cls(sent, counts[0], counts[1], holders[rank()].argsort(stable=True))


class _Fetch(torch.autograd.Function):
    """`all_to_all` of the chosen rows; backwards, their gradients take the same way and are added up."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, route: _Route) -> Tensor:
        ctx.route, ctx.rows = route, len(local)
        arrived = _exchange(local.index_select(0, route.sent), route.sent_to, route.received_from)
        return torch.empty_like(arrived).index_copy_(0, route.order, arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        route: _Route = ctx.route
        returned = _exchange(gradients[0].index_select(0, route.order), route.received_from, route.sent_to)
        total = returned.new_zeros(ctx.rows, *returned.shape[1:])
        return total.index_add_(0, route.sent, returned), None


def _exchange(rows: Tensor, sent_to: list[int], received_from: list[int]) -> Tensor:
    received = rows.new_empty(sum(received_from), *rows.shape[1:])
    dist.all_to_all_single(received, rows, received_from, sent_to)
    return received
