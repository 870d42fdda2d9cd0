"""The training run. `train` is the step, top to bottom; what it needs before the first step is in `setup.py`.

A run has no state but its weights, AdamW's moments and the number of the step: the order of the data, crops,
captions, dropout and negatives are functions of (seed, step). So a run that is killed and resumed ends with
the weights of one that never was, bit for bit, on the same machine with the same number of processes.
"""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from qformers.data.dataset import Trainable
from qformers.errors import QFormersError
from qformers.models.saving import save_model
from qformers.objectives.answers import AnswerObjective
from qformers.objectives.lm import Stage2Objective
from qformers.objectives.output import StepOutput, count_passes
from qformers.objectives.stage1 import Stage1Objective
from qformers.precision import autocast
from qformers.training.batches import training_batches, validation_batches
from qformers.training.config import TrainConfig
from qformers.training.logging import open_log
from qformers.training.optimiser import learning_rate, set_learning_rate
from qformers.training.scaling import whole_state
from qformers.training.setup import CHECKPOINTS, Run, announce, build_run, find_checkpoint, provenance
from qformers.training.watch import Watch
from qformers.training.writer import CheckpointWriter

NAMES_SHOWN = 8
SMALLEST_LOSS_SCALE = 1.0
GLOO_SECONDS = 0.2
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of mallopt's settings in malloc.h

Names = tuple[str, ...]

logger = logging.getLogger(__name__)


class NonFiniteLossError(QFormersError):
    """A loss or gradient is not finite. The state before that step has been saved."""


class TrainingStoppedError(QFormersError):
    """A signal asked the run to stop. Its state has been saved."""


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run left its model, and the newest value of every metric (main process only)."""

    model: Path
    steps: int
    metrics: dict[str, float]


def train(config: TrainConfig, resume: str | None = None) -> TrainResult:
    """Train stage 1 or 2 (paper, sections 3.1 and 3.2) as `config` says; "auto" goes on from the newest checkpoint.

    Raises:
        ConfigError, DataError: the settings or the data do not fit.
        CheckpointError: a checkpoint does not fit, or cannot be written.
        NonFiniteLossError, TrainingStoppedError: the run ended early, its state saved.
        RankStoppedError: another process has stopped; the newest checkpoint is as it was.
    """
    output = Path(config.output)
    checkpoint = find_checkpoint(output, resume)
    # Without `cpu`, accelerate takes each process of a torchrun on a machine without GPU for the only one.
    on_cpu = not torch.accelerator.is_available()
    # While ITC trains alone, the other losses' heads have no gradient; ITG's has none without it.
    idle = config.stage == 1 and (config.objectives.itc_steps > 0 or not config.objectives.itg)
    parts = DistributedDataParallelKwargs(find_unused_parameters=idle)
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_seconds))
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision="no", log_with="tensorboard", project_dir=output, kwargs_handlers=[parts, waiting]
    )
    if on_cpu:
        keep_freed_memory()
    with Watch(config.timeout_seconds) as watch:
        return _train(config, checkpoint, accelerator, watch)


def _train(config: TrainConfig, checkpoint: Path | None, accelerator: Accelerator, watch: Watch) -> TrainResult:
    output = Path(config.output)
    run = build_run(config, checkpoint, accelerator)
    objective, optimiser, scaler = run.objective, run.optimiser, run.scaler
    bare = cast(Stage1Objective | Stage2Objective | AnswerObjective, accelerator.unwrap_model(objective))
    batches = training_batches(config, run.train_data, run.first_step, accelerator)

    with (
        open_log(config, run.first_step, accelerator) as log,
        stop_signals() as stop,
        CheckpointWriter(output / CHECKPOINTS, config.keep_checkpoints, accelerator.is_main_process) as checkpoints,
    ):
        announce(config, run, accelerator)
        for step in range(run.first_step, config.steps + 1):
            watch.step = step
            bare.before_step(step, random_seed(config.seed, step))
            rate = set_learning_rate(optimiser, learning_rate(step, config.optimiser, config.steps))
            step_batches = [next(batches) for _ in range(config.accumulation_steps)]
            drawing = partial(arithmetic, config, accelerator, step)
            count = count_passes(step_batches, config.micro_batch_size)
            done: list[tuple[Names, StepOutput]] = []
            for number, arguments in enumerate(bare.passes(step_batches, config.micro_batch_size, drawing)):
                # Processes exchange gradients once, in the last backward pass.
                with nullcontext() if number == count - 1 else accelerator.no_sync(objective):
                    with drawing(number):
                        result = objective(*arguments)
                    scaler.backward(result.total / count)
                done.append((arguments[0].names, result))
            scaler.unscale()
            grad_norm = torch.nn.utils.clip_grad_norm_(run.trained, config.optimiser.clip_norm)
            # The step's one wait for the device: no weight may move by a gradient that is not a number.
            if on_any_process(not_finite(grad_norm, done, scaler.scale), accelerator):
                checkpoints.save(step - 1, run.model, optimiser)
                raise NonFiniteLossError(accuse(step, done, output))
            scaler.step()
            optimiser.zero_grad()
            bare.after_step()

            log.advance(step)
            row: dict[str, float] = {}
            if step % config.log_every_steps == 0 or step == config.steps:
                row = {**mean_terms(done, accelerator), "lr": rate, "grad_norm": grad_norm.item()}
                row["images_per_second"] = log.images_per_second(step)
                if scaler.scale is not None:
                    row["loss_scale"] = scaler.scale
                row["peak_memory_gb"] = peak_memory_gb(accelerator)
                warn_of_temperature(step, row, config)
                if "tokens_per_image" in row:
                    row["tokens_per_second"] = row["images_per_second"] * row["tokens_per_image"]
            if run.validation_data is not None and step % config.evaluate_every_steps == 0:
                row |= validate(config, run, run.validation_data, accelerator)
                log.start_clock(step)
            if row:
                log.write(step, row)
            stopping = on_any_process(bool(stop) or checkpoints.failed, accelerator)
            validation = row.get("validation/total")
            is_best = validation is not None and checkpoints.is_best(validation)
            if step % config.checkpoint_every_steps == 0 or step == config.steps or stopping or is_best:
                checkpoints.save(step, run.model, optimiser, validation)
            if stopping and step < config.steps:
                raise TrainingStoppedError(f"stopped after step {step} of {config.steps}; go on with --resume auto")
        checkpoints.wait()
        state = whole_state(run.model)
        if accelerator.is_main_process:
            made = provenance(config, run, log.last)
            save_model(run.model, config.model, run.tokenizer, output / "model", run.language, state, made)
        leave_together(accelerator)
    return TrainResult(output / "model", config.steps, log.last)


def random_seed(*entropy: int) -> int:
    """A seed that is a function of some numbers: the run's seed, the step and, where each draws its own, who draws."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@contextmanager
def arithmetic(config: TrainConfig, accelerator: Accelerator, step: int, number: int) -> Iterator[None]:
    """The random numbers and the precision of forward pass `number` (from 0) of `step` on this process."""
    torch.manual_seed(random_seed(config.seed, step, accelerator.process_index, number))
    with autocast(accelerator.device.type, config.precision):
        yield


def not_finite(grad_norm: Tensor, done: Sequence[tuple[Names, StepOutput]], loss_scale: float | None) -> bool:
    """Whether the gradient or a loss of the step is infinite or not a number. Waits for the device, once.

    A gradient too large for fp16 is no fault while the loss can be scaled down: its step is skipped.
    """
    losses = torch.stack([result.total.detach() for _, result in done]).sum()
    scalable = loss_scale is not None and loss_scale > SMALLEST_LOSS_SCALE
    return not math.isfinite(losses if scalable else grad_norm + losses)


def accuse(step: int, done: Sequence[tuple[Names, StepOutput]], output: Path) -> str:
    """One line on what was not finite and on which pictures; all their names go to a file beside the log."""
    what, names = "the gradient is not finite", [name for batch, _ in done for name in batch]
    for batch, result in reversed(done):
        for term, value in result.losses.items():
            if not torch.isfinite(value):
                what, names = f"loss {term} is {value.item()}", list(batch)
    listed = output / f"not_finite_step_{step:08d}.txt"
    listed.write_text("\n".join(names) + "\n", encoding="utf-8")
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (
        f"{what} in step {step} on {', '.join(names[:NAMES_SHOWN])}{more} (all in {listed}); "
        f"the state after step {step - 1} is saved"
    )


def warn_of_temperature(step: int, row: Mapping[str, float], config: TrainConfig) -> None:
    """Say so when the temperature has run up to its bound: ITC learns nothing there."""
    if row.get("temperature", 0.0) >= config.objectives.max_temperature * (1 - 1e-6):
        logger.warning(
            "step %d: the temperature has run up to objectives.max_temperature, %g: lower optimiser.lr",
            step,
            config.objectives.max_temperature,
        )


@torch.no_grad()
def mean_terms(done: Sequence[tuple[Names, StepOutput]], accelerator: Accelerator) -> dict[str, float]:
    """Losses and statistics, averaged over the passes of `done` and over the processes."""
    rows = [
        {
            "loss/total": result.total,
            **{f"loss/{name}": value for name, value in result.losses.items()},
            **result.stats,
        }
        for _, result in done
    ]
    means = torch.stack([torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]])
    everywhere = cast(Tensor, accelerator.reduce(means, "mean"))
    return dict(zip(rows[0], everywhere.tolist(), strict=True))


@torch.no_grad()
def validate(config: TrainConfig, run: Run, dataset: Trainable, accelerator: Accelerator) -> dict[str, float]:
    """The mean of each loss and statistic on `dataset`, with the same hard negatives' draws every time."""
    run.objective.eval()
    bare = cast(Stage1Objective | Stage2Objective | AnswerObjective, accelerator.unwrap_model(run.objective))
    bare.before_step(config.steps, config.seed)
    done, drawing = [], partial(arithmetic, config, accelerator, 0)
    for batch in validation_batches(config, dataset, accelerator):
        for number, arguments in enumerate(bare.passes([batch], config.micro_batch_size, drawing)):
            with drawing(number):
                done.append((arguments[0].names, run.objective(*arguments)))
    run.objective.train()
    return {f"validation/{name.removeprefix('loss/')}": mean for name, mean in mean_terms(done, accelerator).items()}


def peak_memory_gb(accelerator: Accelerator) -> float:
    """The most memory this process has held so far, in GB: the device's, or the machine's on a CPU."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts in kB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def on_any_process(here: bool, accelerator: Accelerator) -> bool:
    """The same answer on all processes, so that none waits for one that has stopped."""
    if accelerator.num_processes == 1:
        return here
    count = accelerator.reduce(torch.tensor(float(here), device=accelerator.device))
    return cast(Tensor, count).item() > 0


def leave_together(accelerator: Accelerator) -> None:
    """Wait until all processes are done, and until gloo's threads are.

    They need the interpreter to free the tensors of their last work. Destroying the group waits for them, and keeps the
    interpreter: a deadlock of torch's own.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        time.sleep(GLOO_SECONDS)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, on Linux; other C libraries are left as they are.

    By itself it gives large blocks back at once, and the kernel zeroes new pages for them in every step: a
    fifth of a small model's step (docs/speed.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM, so that a step is finished and saved before the run ends.

    A second signal acts as if this were not here: it ends the run at once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; a run inside another thread is stopped by its owner.
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
