"""Processes watch each other, so that a run one of them has left ends in time and says which one it was.

Each process raises a number in the store that torch.distributed was started with, every few seconds from a thread of
its own. A number that stands still is of a process that was killed, stopped or cut off; one that goes on while the
process falls behind by a step is of a process that hangs.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, cast

import torch.distributed as dist

from qformers.distributed import rank, world_size
from qformers.errors import QFormersError

LONGEST_INTERVAL_SECONDS = 2.0
SILENT_BEATS = 4  # a process that misses so many beats after an error is the one that stopped
NAMES_SHOWN = 4
DONE, FAILED = "done", "failed"

logger = logging.getLogger(__name__)


class RankStoppedError(QFormersError):
    """Another process of the run has stopped."""


class Watch:
    """While it is entered, this process tells the others that it lives and ends when one of them does not.

    `step` is the newest step that this process has begun. On one process nothing is done.

    Raises:
        RankStoppedError: on leaving with torch.distributed's error, when another process has stopped or fallen behind.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.step = 0
        self._timeout = timeout_seconds
        self._longest_silence = 0.8 * timeout_seconds  # before torch's own limit, which names nobody
        self._interval = min(LONGEST_INTERVAL_SECONDS, timeout_seconds / 8)
        self._rank, self._processes = rank(), world_size()  # they are gone once the process group is
        self._others = [number for number in range(self._processes) if number != self._rank]
        self._leaving = threading.Event()

    def __enter__(self) -> Watch:
        if not self._others:
            return self
        # There is no public way to it. Of rank 0 it may hold the server, so it is kept; a clone may wait by itself.
        self._kept = dist.distributed_c10d._get_default_store()
        self._store: Any = cast(Any, self._kept).clone()
        self._store.set_timeout(timedelta(seconds=self._timeout))
        self._store.set(_where(self._rank), f"{socket.gethostname()}, pid {os.getpid()}")
        self._beat(0)
        dist.barrier()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="qformers_watch")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._others:
            return
        try:
            if isinstance(error, RuntimeError) and (said := self._accuse(error)):
                # Nothing may wait for that process on the way out, not even C++ that holds the interpreter.
                faulthandler.dump_traceback_later(self._timeout, exit=True)
                raise RankStoppedError(said) from error
        finally:
            self._leaving.set()
            self._thread.join()
            self._tell(DONE if error is None else FAILED)

    def _watch(self) -> None:
        """Beat, and end this process when another has been silent for too long."""
        heard: dict[int, tuple[str, float]] = dict.fromkeys(self._others, ("", time.monotonic()))
        for count in range(1, sys.maxsize):
            if self._leaving.wait(self._interval):
                return
            now = time.monotonic()
            try:
                self._beat(count)
                beats = self._listen()
            except RuntimeError:
                # The store is gone, and with it what keeps it. The others' silence is then all there is to hear.
                beats = {number: beat for number, (beat, _) in heard.items()}
            for number, beat in beats.items():
                if beat != heard[number][0] or beat == DONE:
                    heard[number] = (beat, now)
                elif now - heard[number][1] > self._longest_silence:
                    self._end(number)

    def _end(self, number: int) -> None:
        """The main thread waits in a collective that cannot be interrupted: the process ends from here."""
        message = f"{self._name(number)} has not answered for {self._longest_silence:g} s; go on with --resume auto"
        logger.error(message)
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def _accuse(self, error: RuntimeError) -> str | None:
        """Who is to blame for an error of torch.distributed; None if nobody is."""
        try:
            before = self._listen()
            for _ in range(SILENT_BEATS):
                time.sleep(self._interval)
            after = self._listen()
        except RuntimeError:
            return f"{self._name(0)} or the launcher has stopped; go on with --resume auto"
        stopped = [
            number for number in self._others if after[number] in (FAILED, before[number]) and after[number] != DONE
        ]
        if stopped:
            names = " and ".join(self._name(number) for number in stopped)
            return f"{names} stopped in step {self.step}; go on with --resume auto"
        behind = {number: int(after[number].split()[1]) for number in self._others if after[number] != DONE}
        earliest = min(behind.values(), default=self.step)
        if earliest == self.step and "imed out" not in str(error):
            return None
        slowest = [self._name(number) for number in behind if behind[number] == earliest]
        return (
            f"{' or '.join(slowest[:NAMES_SHOWN])} hangs in step {earliest}, waited for in step {self.step} "
            f"for {self._timeout:g} s; go on with --resume auto"
        )

    def _beat(self, count: int) -> None:
        self._store.set(_beat_of(self._rank), f"{count} {self.step}")

    def _tell(self, last: str) -> None:
        try:
            self._store.set(_beat_of(self._rank), last)
        except RuntimeError:
            logger.debug("the store is gone")

    def _listen(self) -> dict[int, str]:
        beats = self._store.multi_get([_beat_of(number) for number in self._others])
        return {number: beat.decode() for number, beat in zip(self._others, beats, strict=True)}

    def _name(self, number: int) -> str:
        name = f"process {number} of {self._processes}"
        try:
            return f"{name} ({self._store.get(_where(number)).decode()})"
        except RuntimeError:
            return name


def _beat_of(number: int) -> str:
    return f"qformers/beat/{number}"


def _where(number: int) -> str:
    return f"qformers/where/{number}"
