"""The batches a process trains on: a function of the seed and the step alone, so a run resumes anywhere."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qformers.data.batch import Batch
from qformers.data.broken import BrokenTally
from qformers.data.dataset import Trainable, make_loader
from qformers.errors import DataError
from qformers.training.config import TrainConfig

WORKER_DEATHS = 3  # that a run survives

logger = logging.getLogger(__name__)


def training_batches(
    config: TrainConfig, dataset: Trainable, first_step: int, accelerator: Accelerator
) -> Iterator[Batch]:
    """The batches of steps `first_step` to the last, on the accelerator's device.

    Raises:
        ConfigError, DataError: batches of the asked size cannot be made. Later, while they are read,
            DataError: too many pictures cannot be read, or none of a whole batch, or loading workers die again
            and again.
    """

    def loader_from(start_step: int) -> DataLoader:
        loader = make_loader(
            dataset,
            config.data.batch_size,
            seed=config.seed,
            start_step=start_step,
            stop_step=config.steps * config.accumulation_steps,
            workers=config.data.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle_buffer=config.data.shuffle_buffer,
            together_column=config.data.together_column,
            whole_batches=config.data.mix_by == "batches",
        )
        loader.worker_init_fn = _leave_signals_to_parent
        # Its own: a loader draws a number when it starts, which would shift the draws of a resumed run's step.
        loader.generator = torch.Generator()
        return loader

    done = (first_step - 1) * config.accumulation_steps
    return _stream(config, loader_from(done), loader_from, done, accelerator)


def _stream(
    config: TrainConfig,
    loader: DataLoader,
    loader_from: Callable[[int], DataLoader],
    done: int,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    """The batches of `loader`, which begins after `done` of them, checked and on the device."""
    tally = BrokenTally(Path(config.output) / "broken_images.log", config.data.max_broken_fraction)
    rows = config.data.batch_size // accelerator.num_processes
    for batch in _with_new_workers(loader, loader_from, done):
        tally.add(batch)
        if len(batch) == 0:
            first = batch.broken[0]
            raise DataError(f"no row of a whole batch can be used: {first.name}: {first.reason}")
        yield fill(batch.to(accelerator.device), rows, accelerator.num_processes)


def _with_new_workers(loader: DataLoader, loader_from: Callable[[int], DataLoader], done: int) -> Iterator[Batch]:
    """All batches, in order, also when loading workers die: what a batch holds is a function of its number alone."""
    for death in itertools.count(1):
        try:
            for batch in _start(loader):
                yield batch
                done += 1
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _tells_of_death(error):
                raise
            said = " ".join(str(error).split())
            if death > WORKER_DEATHS:
                raise DataError(
                    f"a loading worker died ({said}), {death} times in this run: the machine may lack memory, lower "
                    "data.workers and go on with --resume auto"
                ) from error
            logger.warning("a loading worker died (%s): others take its place, nothing is lost", said)
            loader = loader_from(done)


def _tells_of_death(error: Exception) -> bool:
    """Of a worker: torch says so itself, or the connection to it breaks while it hands over a batch."""
    said = str(error)
    if isinstance(error, RuntimeError):
        return said.startswith("DataLoader worker (pid")
    # What a worker raises of its own begins with "Caught".
    return isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and not said.startswith("Caught")


def _start(loader: DataLoader) -> Iterator[Batch]:
    """The loader's iterator, which tells of a dead worker when a batch is asked for, and only then.

    torch's handler of SIGCHLD would raise wherever the main thread is: in the middle of a backward pass.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    started = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return started


def validation_batches(config: TrainConfig, dataset: Trainable, accelerator: Accelerator) -> Iterator[Batch]:
    """One pass over `dataset` in whole batches; what is left over at the end is not measured."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = min(config.data.batch_size, len(dataset)) // processes
    starts = range(0, len(dataset) - share * processes + 1, share * processes)
    loader = DataLoader(
        cast(Dataset, dataset),
        batch_sampler=[[(0, start + rank * share + row) for row in range(share)] for start in starts],
        collate_fn=dataset.collate,
        num_workers=config.data.workers,
        multiprocessing_context="spawn" if config.data.workers else None,
        worker_init_fn=_leave_signals_to_parent,
    )
    for batch in loader:
        if len(batch):
            yield fill(batch.to(accelerator.device), share, processes)


def fill(batch: Batch, rows: int, processes: int) -> Batch:
    """Repeat the first rows in place of broken ones, but only beside other processes: all need as many rows.

    A repeated row keeps its image id, so it is not taken for a negative of itself.
    """
    if processes == 1 or len(batch) == rows:
        return batch
    chosen = torch.arange(rows, device=batch.input_ids.device) % len(batch)
    filled: dict[str, Any] = {name: value[chosen] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    if batch.answers is not None:
        filled["answers"] = batch.answers.of_rows(chosen)
    return replace(batch, **filled, names=tuple(batch.names[row] for row in chosen.tolist()))


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the parent finishes its step and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
