"""Checkpoints written beside training: a snapshot is taken between two steps and goes to the disk meanwhile."""

from __future__ import annotations

import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from qformers.training.checkpoint import Snapshot, best_checkpoint, save_checkpoint, validation_loss

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves into `folder`, one checkpoint at a time, on the main process alone; the others hold equal copies.

    The process then holds one more copy of the trained parameters and their moments. Leaving the `with` waits for
    what is being written.
    """

    def __init__(self, folder: Path, keep: int, is_main_process: bool) -> None:
        self.folder = folder
        self.keep = keep
        self._is_main_process = is_main_process
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._saved: int | None = None
        best = best_checkpoint(folder) if is_main_process else None
        self._best_loss = math.inf if best is None else validation_loss(best)

    def save(
        self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, validation: float | None = None
    ) -> None:
        """Copy the state after `step` and write it meanwhile. Raises CheckpointError if the last one failed."""
        self.wait()
        if self._is_main_process and step != self._saved:
            self._saved = step
            snapshot = Snapshot.take(step, model, optimiser, validation)
            self._writing = self._thread.submit(save_checkpoint, self.folder, snapshot, self.keep)

    def is_best(self, loss: float) -> bool:
        """Whether `loss` is lower than every one before."""
        if not loss < self._best_loss:
            return False
        self._best_loss = loss
        return True

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` says why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises CheckpointError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._writing is not None and self._writing.exception() is not None and error is not None:
                logger.error("%s", error)  # the one below hides it
            self.wait()
        finally:
            self._thread.shutdown()
