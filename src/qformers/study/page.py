"""study.md and results.json: nothing on the page is typed by hand."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from qformers.demo.recipe import LanguageModelName
from qformers.report.page import duration
from qformers.study.figures import Results, draw
from qformers.study.questions import LEAST_SEEDS, METRICS, Comparison, Question, Values, verdict
from qformers.version import __version__

LANGUAGE: dict[LanguageModelName, str] = {
    "smollm2": "a frozen SmolLM2-135M",
    "t5": "frozen language models, a small T5 that says captions and SmolLM2-135M that answers questions",
}
RULE = (
    f'"Agrees" is said where the difference has the claim\'s sign with every seed, "does not agree" where it has the '
    f'other sign with every seed, "cannot tell" otherwise and with fewer than {LEAST_SEEDS} seeds. With three seeds a '
    "coin would agree one time in eight."
)


@dataclass(frozen=True)
class Circumstances:
    """How a page came about; `language` says which frozen language models spoke."""

    command: str
    language: str
    commit: str
    machine: str
    date: str


def circumstances(command: str, captioner: LanguageModelName, date: str) -> Circumstances:
    """Of this process; `commit` is the version where this is no checkout."""
    cores = os.cpu_count()
    machine = f"{cores} cores, {_processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return Circumstances(command, LANGUAGE[captioner], _commit(), machine, date)


def write_study(
    output: Path, questions: Sequence[Question], results: Results, seeds: int, seconds: float, how: Circumstances
) -> None:
    """The page, its figures and results.json; older ones are replaced."""
    figures = output / "figures"
    figures.mkdir(exist_ok=True)
    values = values_of(results)
    for question in questions:
        draw(question, results, figures / f"question_{question.number}.png")
    verdicts = {
        str(question.number): [_judged(question, comparison, values) for comparison in question.comparisons]
        for question in questions
    }
    content = {"how": asdict(how), "seconds": seconds, "arms": results, "verdicts": verdicts}
    _replace(output / "results.json", json.dumps(content, indent=2) + "\n")
    _replace(output / "study.md", page(questions, results, seeds, seconds, how))


def page(questions: Sequence[Question], results: Results, seeds: int, seconds: float, how: Circumstances) -> str:
    """The page as Markdown; figures beside it under `figures/`."""
    values = values_of(results)
    arms = dict.fromkeys(arm.name for question in questions for arm in question.arms)
    done, planned = sum(len(results.get(arm, {})) for arm in arms), len(arms) * seeds
    unfinished = "" if done == planned else f" **Unfinished: {done} of {planned} runs so far.**"
    lines = [
        "# The paper's questions, asked again at a small scale",
        "",
        "Claims of BLIP-2 (arXiv 2301.12597), tried on emoji, stamps and composed scenes with a frozen DINOv2 and "
        f"{how.language}: runs of minutes, where the paper's took days. Small runs say little about large ones; "
        "an arm that learns too little in them to differ says nothing." + unfinished,
        "",
        f"    {how.command}",
        "",
        f"Commit {how.commit}; {how.machine}; {duration(seconds)} in all; {how.date}. {RULE}",
        "",
        "| question | claim | verdict |",
        "|---|---|---|",
    ]
    for question in questions:
        for comparison in question.comparisons:
            said = verdict(comparison.differences(values))
            lines.append(f"| {question.number}. {question.title} | {question.claim_of(comparison)} | {said} |")
    for question in questions:
        lines += ["", *section(question, results, values)]
    return "\n".join(lines) + "\n"


def section(question: Question, results: Results, values: Values) -> list[str]:
    """The paper's claim, our table and figure, and the verdict on each comparison."""
    lines = [
        f"## {question.number}. {question.title}",
        "",
        f"**Paper.** {question.claim}",
        "",
        f"**Here.** {question.here}",
        "",
        f"| | {' | '.join(METRICS[metric] for metric in question.metrics)} | seeds |",
        f"|---|{'---|' * len(question.metrics)}---|",
    ]
    for arm in question.arms:
        known = values.get(arm.name, {})
        cells = [
            mean_and_spread([row[metric] for row in known.values() if metric in row]) for metric in question.metrics
        ]
        lines.append(f"| {question.title_of(arm)} | {' | '.join(cells)} | {len(known)} |")
    if any(results.get(arm.name) for arm in question.arms):
        lines += ["", f"![{question.title}](figures/question_{question.number}.png)"]
    lines.append("")
    for comparison in question.comparisons:
        differences = comparison.differences(values)
        gains = ", ".join(f"{difference:+.3f}" for difference in differences.values()) or "no seed yet"
        lines.append(f"- {question.claim_of(comparison)}: **{verdict(differences)}** (by seed: {gains})")
    return lines


def values_of(results: Results) -> dict[str, dict[int, dict[str, float]]]:
    """Metrics and costs of every finished run in one table."""
    return {
        arm: {seed: {**result["metrics"], **result["cost"]} for seed, result in by_seed.items()}
        for arm, by_seed in results.items()
    }


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; one value alone has none."""
    if not values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _judged(question: Question, comparison: Comparison, values: Values) -> dict[str, Any]:
    differences = comparison.differences(values)
    return {"claim": question.claim_of(comparison), "differences": differences, "verdict": verdict(differences)}


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return f"of version {__version__}"
    return described.stdout.strip() if described.returncode == 0 else f"of version {__version__}"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines() if file.exists() else ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _replace(file: Path, content: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(file)
