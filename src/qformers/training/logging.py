"""What a run writes about itself: metrics, log, trackers, and the progress on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qformers.training.config import TrainConfig

METRIC = {"is_metric": True}

logger = logging.getLogger(__name__)


class RunLog:
    """Metrics to `metrics.jsonl`, the trackers and the terminal, from the main process only.

    `last` holds the newest value of every metric.
    """

    def __init__(self, config: TrainConfig, first_step: int, accelerator: Accelerator, progress: Progress) -> None:
        self.last: dict[str, float] = {}
        self._steps = config.steps
        self._images_per_step = config.data.batch_size * config.accumulation_steps
        self._metrics = Path(config.output) / "metrics.jsonl"
        self._accelerator = accelerator
        self._progress = progress
        self._task = progress.add_task("training", total=config.steps, completed=first_step - 1, terms="")
        self.start_clock(first_step - 1)

    def start_clock(self, step: int) -> None:
        """Throughput is measured from here, after `step`."""
        self._clock, self._clock_step = time.perf_counter(), step

    def images_per_second(self, step: int) -> float:
        """Of all processes together, since the clock was started; starts it anew."""
        rate = (step - self._clock_step) * self._images_per_step / (time.perf_counter() - self._clock)
        self.start_clock(step)
        return rate

    def advance(self, step: int) -> None:
        """Show that `step` is done."""
        self._progress.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The one row of `step`."""
        self.last.update(values)
        if not self._accelerator.is_main_process:
            return
        # Closed after every row, so that a killed run keeps every row it has written.
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(dict(values), step=step)
        if "images_per_second" in values:
            terms = f"{_terms(values, 'loss/')}, {values['images_per_second']:.4g} images/s"
            left = (self._steps - step) * self._images_per_step / values["images_per_second"]
            self._progress.update(self._task, terms=terms)
            line = f"{terms}, {timedelta(seconds=round(left))} left"
            logger.info("step %d/%d: %s", step, self._steps, line, extra=METRIC)
        if validation := _terms(values, "validation/"):
            logger.info("step %d/%d: validation %s", step, self._steps, validation)


@contextmanager
def open_log(config: TrainConfig, first_step: int, accelerator: Accelerator) -> Iterator[RunLog]:
    """The run's log for as long as training lasts.

    Rows and events of `first_step` and later, left by the part of the run that is repeated now, are dropped.
    """
    run, is_main = Path(config.output), accelerator.is_main_process
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[terms]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not (is_main and console.is_terminal),
    )
    if is_main:
        run.mkdir(parents=True, exist_ok=True)
        drop_rows_from(run / "metrics.jsonl", first_step)
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step}})
    try:
        with _handlers(run, console) if is_main else nullcontext(), progress:
            yield RunLog(config, first_step, accelerator, progress)
    finally:
        accelerator.end_training()


def drop_rows_from(metrics: Path, first_step: int) -> None:
    """Remove the rows of `first_step` and later, and a row that was cut off when the run was killed."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] < first_step:
            kept.append(line)
    replacement = metrics.with_suffix(".jsonl.new")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(metrics)


@contextmanager
def _handlers(run: Path, console: Console) -> Iterator[None]:
    """Send the package's log to `train.log` and to stderr."""
    to_file = logging.FileHandler(run / "train.log", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if console.is_terminal:
        to_stderr: logging.Handler = RichHandler(console=console, show_time=False, show_path=False)
        # The bar shows the newest metrics already.
        to_stderr.addFilter(lambda record: not getattr(record, "is_metric", False))
    else:
        to_stderr = logging.StreamHandler(sys.stderr)
    package = logging.getLogger("qformers")
    level, propagate = package.level, package.propagate
    package.setLevel(logging.INFO)
    # The bar and the lines beside it need stderr for themselves.
    package.propagate = False
    for handler in (to_file, to_stderr):
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        package.propagate = propagate
        for handler in (to_file, to_stderr):
            package.removeHandler(handler)
        to_file.close()


def _terms(values: Mapping[str, float], prefix: str) -> str:
    return " ".join(
        f"{name.removeprefix(prefix)} {value:.4g}" for name, value in values.items() if name.startswith(prefix)
    )
