"""`qformers study`: every arm with one seed, then with the next; the page is written anew after each."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from qformers.demo.recipe import LanguageModelName
from qformers.errors import ConfigError
from qformers.report.page import duration
from qformers.study.arms import Arm, with_their_starts
from qformers.study.config import SIZES, StudySizeName
from qformers.study.figures import Results
from qformers.study.inputs import Inputs, demo_inputs, write_parts
from qformers.study.page import circumstances, write_study
from qformers.study.questions import Question, questions_of
from qformers.study.running import Bench, run_arm
from qformers.training.loop import TrainingStoppedError

SETTINGS = "settings.json"
console = Console(stderr=True)


def run_study(
    output: Path,
    size: StudySizeName = "full",
    questions: Sequence[int] | None = None,
    seeds: int = 3,
    language_model: LanguageModelName = "smollm2",
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Train the arms of `questions` (None: of all) with seeds 0 to `seeds` - 1, and write study.md into `output`.

    The same call goes on after a kill, and with more questions or seeds adds to what is there; no finished run is
    trained again.

    Args:
        language_model: who says captions, as in the demo: SmolLM2, or a small T5 made of the training captions, which
            learns to look in far fewer steps. SmolLM2 answers questions in any case.
        inputs: models and data sets; None: the demo's.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: there is no such question, or `output` holds something else. DataError: the assets cannot be had.
        TrainingStoppedError: a signal asked for it; the run's state is saved.
    """
    known = questions_of(SIZES[size])
    asked = [known[number] for number in sorted(set(_known(known, questions)))]
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}: at least 1 is needed, and 3 for a verdict")
    _claim_folder(output, size, language_model, inputs)
    inputs = inputs or demo_inputs(output, SIZES[size], language_model)
    bench = Bench(output.resolve(), inputs, SIZES[size], language_model)
    write_parts(inputs, output / "parts", SIZES[size])
    numbers = "" if questions is None else f" --questions {','.join(str(question.number) for question in asked)}"
    command = f"qformers study {output} --size {size}{numbers} --seeds {seeds} --language_model {language_model}"
    how = circumstances(command, language_model, date.today().isoformat())
    arms = with_their_starts([arm for question in asked for arm in question.arms])
    todo = [(arm, seed) for seed in range(seeds) for arm in arms]
    results: dict[str, dict[int, dict[str, Any]]] = {}
    taken: list[float] = []  # seconds of the runs of this call
    for number, (arm, seed) in enumerate(todo, 1):
        result = bench.result(arm, seed)
        if result is None:
            _announce(number, todo, arm, seed, taken, bench)
            started = time.perf_counter()
            result = _run(bench, arm, seed, command)
            taken.append(time.perf_counter() - started)
        results.setdefault(arm.name, {})[seed] = result
        if taken or number == len(todo):
            write_study(output, asked, results, seeds, _seconds(results), how)
    console.print(f"page: {output / 'study.md'}", highlight=False)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def _known(known: dict[int, Question], asked: Sequence[int] | None) -> Sequence[int]:
    for number in asked or ():
        if number not in known:
            raise ConfigError(f"question {number} is not one of the study's: they are 1 to {max(known)}")
    return list(known) if asked is None else asked


def _claim_folder(output: Path, size: StudySizeName, language_model: LanguageModelName, inputs: Inputs | None) -> None:
    """Note in `output` what it is for, or see that it is for this."""
    chosen = None if inputs is None else {name: str(path) for name, path in asdict(inputs).items()}
    settings = json.loads(
        json.dumps({"size": size, "language_model": language_model, "sizes": asdict(SIZES[size]), "inputs": chosen})
    )
    file = output / SETTINGS
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            differs = next((name for name in ("size", "language_model") if before[name] != settings[name]), None)
            other = f"{differs} {before[differs]}" if differs else "other settings or data"
            raise ConfigError(f"{output} holds a study of {other}: choose another folder, or remove it")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already and is no study: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{SETTINGS}")
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def _run(bench: Bench, arm: Arm, seed: int, command: str) -> dict[str, Any]:
    try:
        return run_arm(bench, arm, seed)
    except TrainingStoppedError as stopped:
        raise TrainingStoppedError(f"{arm.name}, seed {seed}: its state is saved; go on with {command}") from stopped


def _announce(number: int, todo: list[tuple[Arm, int]], arm: Arm, seed: int, taken: list[float], bench: Bench) -> None:
    waiting = sum(bench.result(other, of) is None for other, of in todo)
    left = f", about {duration(waiting * sum(taken) / len(taken))} left" if taken else ""
    console.print(f"[bold]run {number} of {len(todo)}[/bold]: {arm.name}, seed {seed}{left}", highlight=False)


def _seconds(results: Results) -> float:
    return sum(result["cost"]["seconds"] for by_seed in results.values() for result in by_seed.values())
