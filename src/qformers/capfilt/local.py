"""The local engine: one process per device, in each of which reading, captioning and ranking overlap."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from qformers.capfilt.pictures import Pictures
from qformers.capfilt.stages import (
    CaptionStage,
    FailedPart,
    Models,
    Plan,
    RankedPart,
    RankStage,
    ReadStage,
    attempt,
    open_models,
)
from qformers.errors import QFormersError
from qformers.training.loop import keep_freed_memory

READ_AHEAD, RANK_BEHIND = 4, 2  # parts: what waits in memory between two stages

In = TypeVar("In")
Out = TypeVar("Out")


def run_local(
    plan: Plan, pictures: Pictures, models: Models, shards: list[int], readers: int
) -> Iterator[RankedPart | FailedPart]:
    """Parts of the shards as they are done, in order, by the models of one device.

    Decoding runs in `readers` threads ahead of the captioner and ranking in one behind it: they leave Python's lock
    while they compute, so the captioner hardly waits.
    """
    keys = (key for shard in shards for key in plan.keys(shard))
    read, caption = ReadStage(plan, pictures), CaptionStage(plan, models.captioner)
    rank = RankStage(plan, models.ranker, models.judge)
    with _threads(plan.threads), ThreadPoolExecutor(readers) as reading, ThreadPoolExecutor(1) as ranking:
        parts = _ahead(reading, lambda key: attempt(read, key), keys, READ_AHEAD)
        captioned = (attempt(caption, part) for part in parts)
        yield from _ahead(ranking, lambda part: attempt(rank, part), captioned, RANK_BEHIND)


def run_processes(plan: Plan, devices: list[str], shards: list[int], readers: int) -> Iterator[RankedPart | FailedPart]:
    """The same by one process for each device, each with every so many-th shard. A process that dies is missed at the
    end by the shards that are not done.

    Raises:
        QFormersError: of any of them that trying again would not mend.
    """
    context = get_context("spawn")
    connections: list[Connection[Any, Any]] = []
    processes = []
    for number, device in enumerate(devices):
        receiving, sending = context.Pipe(duplex=False)
        arguments = (plan, device, shards[number :: len(devices)], readers, sending)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        sending.close()  # the child's alone: when it dies, the pipe ends
        connections.append(receiving)
        processes.append(process)
    try:
        while connections:
            ready = wait(connections)
            for connection in [one for one in connections if one in ready]:
                try:
                    part = connection.recv()
                except EOFError:
                    connections.remove(connection)
                    continue
                if isinstance(part, QFormersError):
                    raise part
                yield part
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(plan: Plan, device: str, shards: list[int], readers: int, connection: Connection[Any, Any]) -> None:
    """A process: its shards' parts into the pipe, until they are done or its parent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends it
    try:
        models = open_models(plan.captioner, plan.ranker, plan.sampling, plan.ranking.judge, device)
        for part in run_local(plan, Pictures(plan.source), models, shards, readers):
            connection.send(part)
    except QFormersError as error:
        connection.send(error)
    except BrokenPipeError:
        return  # nobody is left to write it down


def _ahead(pool: Executor, work: Callable[[In], Out], items: Iterable[In], depth: int) -> Iterator[Out]:
    """`work` of each item in order, done in `pool` while at most `depth` results wait."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    keep_freed_memory()  # the scores of a step, rows × vocabulary, are large blocks of one size
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
