"""What every benchmark measures with: ours and the peer in turn, FLOPs, memory, and what the machine could do."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], Any]
Clock = Callable[[], tuple[float, float]]
"""Does some work and says how long it took: seconds by the clock, and of processor time."""
Result = dict[str, Any]


def alternate(ours: Work, peer: Work, repetitions: int, warm_up: int = 1) -> Result:
    """Both in turn, `repetitions` times after `warm_up`: the ratios peer / ours, above 1 where we are faster.

    `ratio` is of the clock. `cpu_ratio` is of processor time of all threads: beside other work the steadier one.
    """
    return in_turn(partial(timed, ours), partial(timed, peer), repetitions, warm_up)


def in_turn(ours: Clock, peer: Clock, repetitions: int, warm_up: int = 1) -> Result:
    """`alternate` of works that time themselves, such as those of an `Apart`."""
    rows = [(ours(), peer()) for _ in range(warm_up + repetitions)][warm_up:]
    return {
        "ratio": spread([theirs[0] / own[0] for own, theirs in rows]),
        "cpu_ratio": spread([theirs[1] / own[1] for own, theirs in rows]),
        "seconds": {"ours": median(own[0] for own, _ in rows), "peer": median(theirs[0] for _, theirs in rows)},
        "cpu_seconds": {"ours": median(own[1] for own, _ in rows), "peer": median(theirs[1] for _, theirs in rows)},
        "repetitions": repetitions,
    }


def timed(work: Work) -> tuple[float, float]:
    """Seconds by the clock, and of processor time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


class Apart:
    """Work in a fresh process of its own, which `make` prepares there; entered, it can be called to time it once.

    Beside another it shares nothing but the machine: not what an allocator was told, nor memory that was kept.
    """

    def __init__(self, make: Callable[..., Work], *arguments: Any) -> None:
        self._here, self._there = Pipe()
        arguments = (self._there, make, arguments)
        self._process = get_context("spawn").Process(target=_time_on_demand, args=arguments, daemon=True)

    def __enter__(self) -> Apart:
        self._process.start()
        self._there.close()  # its end is the process's alone: should that die, what waits for it gets an error
        self._here.recv()
        return self

    def __exit__(self, *error: object) -> None:
        self._here.send(False)
        self._process.join()

    def __call__(self) -> tuple[float, float]:
        """As `timed`."""
        self._here.send(True)
        return self._here.recv()


def _time_on_demand(there: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    work = make(*arguments)
    there.send(None)
    while there.recv():
        there.send(timed(work))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def machine(dtype: torch.dtype) -> Result:
    """Where it was measured."""
    return {
        "device": "cpu",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def flops(work: Work) -> int:
    """Products and sums of matrix products and attention, by torch's counter, of all passes that `work` runs.

    It does not know a CPU's fused attention, so attention is written out here.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_fraction(work_flops: float, cpu_seconds: float, dtype: torch.dtype, side: int = 2048) -> float:
    """The share that was reached of this machine's speed in one large matrix product in `dtype`, the best of five.

    Both by processor time, which other work on the machine hardly changes; threads waiting for each other take it too.
    """
    left, right = torch.randn(2, side, side).to(dtype)
    torch.mm(left, right)
    fastest = 2 * side**3 / min(timed(lambda: torch.mm(left, right))[1] for _ in range(5))
    return work_flops / cpu_seconds / fastest


def saved_bytes(model: nn.Module, forward: Work) -> int:
    """Bytes that `forward` keeps for the backward pass, each storage once and without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept_alive = forward()
    del kept_alive
    return sum(storages.values())


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)
        }
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


def peak_bytes(work: Work) -> int:
    """Of all tensors that `work` makes."""
    with PeakBytes() as counted:
        work()
    return counted.peak
