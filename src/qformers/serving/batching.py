"""Dynamic batching: requests that arrive within a small window, or while the model is busy, share a forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from qformers.serving.metrics import Metrics

Run = Callable[[list[Any]], list[Any]]  # rows → an answer for each


@dataclass(eq=False)
class _Job:
    """Rows of one request. Jobs of one `key` may share a call of `run`."""

    key: Hashable
    run: Run
    rows: list[Any]
    answer: asyncio.Future[list[Any]]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """One model thread and what waits for it, oldest first.

    The oldest job goes with all of its key, up to `max_rows` rows. While fewer have come than the last batch had, it
    waits for others, at most `window_seconds`: clients that were answered together ask again together, and one alone
    does not wait. A job that its request has given up is dropped; one that fails does not fail those beside it.
    """

    def __init__(self, window_seconds: float, max_rows: int, metrics: Metrics) -> None:
        self.window_seconds = window_seconds
        self.max_rows = max_rows
        self.metrics = metrics
        self._jobs: list[_Job] = []
        self._last_jobs = 1  # in the last batch
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def submit(self, key: Hashable, run: Run, rows: list[Any]) -> list[Any]:
        """The answers to `rows`, in order. Cancelled while it waits, it is never run.

        Raises:
            What `run` raises for these rows.
        """
        job = _Job(key, run, rows, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._changed.set()
        try:
            return await job.answer
        finally:
            if job in self._jobs:
                self._jobs.remove(job)

    async def work(self) -> None:
        """Runs batches, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._jobs:
                self._changed.clear()
                await self._changed.wait()
            await self._let_others_come(self._jobs[0])
            if batch := self._next_batch():
                self._last_jobs = len(batch)
                rows = sum(len(job.rows) for job in batch)
                self.metrics.batch_rows.observe(rows)
                start = time.monotonic()
                outcomes = await loop.run_in_executor(self._thread, _run_jobs, batch)
                self.metrics.model_seconds.inc(time.monotonic() - start)
                for job, outcome in zip(batch, outcomes, strict=True):
                    if job.answer.done():
                        continue
                    if isinstance(outcome, Exception):
                        job.answer.set_exception(outcome)
                    else:
                        job.answer.set_result(outcome)

    def close(self) -> None:
        """Let the model thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _let_others_come(self, first: _Job) -> None:
        deadline = first.since + self.window_seconds
        while first in self._jobs and self._fewer_than_last(first):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return

    def _fewer_than_last(self, first: _Job) -> bool:
        alike = [job for job in self._jobs if job.key == first.key]
        return len(alike) < self._last_jobs and sum(len(job.rows) for job in alike) < self.max_rows

    def _next_batch(self) -> list[_Job]:
        """The oldest job and others of its key that fit, taken off what waits."""
        batch: list[_Job] = []
        room = self.max_rows
        for job in self._jobs:
            if job.key == self._jobs[0].key and (not batch or len(job.rows) <= room):
                batch.append(job)
                room -= len(job.rows)
        self._jobs = [job for job in self._jobs if job not in batch]
        return batch


def _run_jobs(batch: list[_Job]) -> list[list[Any] | Exception]:
    """The answers to each job, or what went wrong with it: together, and if that fails one by one."""
    try:
        answers = iter(batch[0].run([row for job in batch for row in job.rows]))
        return [[next(answers) for _ in job.rows] for job in batch]
    except Exception as error:
        if len(batch) == 1:
            return [error]
        return [_run_jobs([job])[0] for job in batch]
