"""The study at toy size: all questions, a kill in between, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_study import study_some, toy_inputs

from qformers.cli import main
from qformers.errors import ConfigError
from qformers.study import running
from qformers.study.config import SIZES
from qformers.study.inputs import Inputs
from qformers.study.questions import questions_of
from qformers.study.run import run_study

CHILD = """
import sys
from pathlib import Path
from qformers.study.inputs import Inputs
from toy_study import study_some
study_some(Inputs(*map(Path, sys.argv[2:])), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return toy_inputs(tmp_path_factory.mktemp("study") / "inputs")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """All questions with one seed."""
    output = tmp_path_factory.mktemp("study") / "whole"
    run_study(output, "tiny", seeds=1, inputs=inputs)
    return output


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def measured(output: Path) -> dict:
    """Metrics and curves of every run: what does not depend on the clock."""
    return {
        (arm, seed): (result["metrics"], result["curve"])
        for arm, by_seed in results(output)["arms"].items()
        for seed, result in by_seed.items()
    }


def test_every_question_has_its_table_its_figure_and_a_verdict(whole):
    page = (whole / "study.md").read_text()
    questions = questions_of(SIZES["tiny"])
    for number, question in questions.items():
        assert f"## {number}. {question.title}" in page and question.claim in page
        figure = (whole / "figures" / f"question_{number}.png").read_bytes()
        assert figure.startswith(b"\x89PNG")
        section = page.partition(f"## {number}. ")[2].partition("\n## ")[0]
        assert all(f"| {question.title_of(arm)} |" in section for arm in question.arms) and section.count("–") == (
            2 if number == 8 else 0
        )
        # One seed tells nothing.
        assert section.count("**cannot tell**") == len(question.comparisons)
    assert "qformers study" in page and "Unfinished" not in page
    assert results(whole)["how"]["commit"] in page


def test_arms_differ_where_they_are_meant_to(whole):
    found = {arm: result["0"] for arm, result in results(whole)["arms"].items()}
    assert found["base"]["metrics"] != found["no_itg"]["metrics"]
    assert found["queries_1"]["cost"]["step_gflop"] < found["contrast"]["cost"]["step_gflop"]
    assert [step for step, _ in found["captions"]["curve"]] == list(range(1, 7))
    assert found["captions"]["curve"] != found["captions_without_stage_1"]["curve"]
    log = [json.loads(line) for line in (whole / "arms" / "no_itg-0" / "metrics.jsonl").read_text().splitlines()]
    assert not any("loss/itg" in row for row in log) and "loss/itm" in log[0]
    log = [json.loads(line) for line in (whole / "arms" / "contrast-0" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 3 and not any("loss/itm" in row for row in log)
    assert 0 <= found["cleaned"]["metrics"]["swapped_kept"] <= 1
    assert not list(whole.glob("arms/*/checkpoints")), "fifty runs would fill a disk"


def test_held_out_pictures_and_those_of_capfilt_are_not_learned(whole):
    ids = {
        part: {json.loads(line)["image_id"] for line in (whole / "parts" / f"{part}.jsonl").read_text().splitlines()}
        for part in ("train", "noisy", "held_out", "questions", "asked")
    }
    assert len(ids["train"]) == 24 and len(ids["noisy"]) == 16
    assert not ids["train"] & ids["noisy"] and not ids["held_out"] & (ids["train"] | ids["noisy"])
    assert not ids["questions"] & ids["asked"]


def test_killed_and_started_again_it_ends_with_the_same_and_trains_nothing_twice(whole, inputs, tmp_path, monkeypatch):
    output, arms = tmp_path / "killed", tmp_path / "killed" / "arms"
    paths = [inputs.encoder, inputs.text_encoder, inputs.captioner, inputs.answerer, inputs.captions, inputs.questions]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, output, *paths], env=environment, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (arms / "no_itg-0" / "metrics.jsonl").exists():
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (
        (arms / "contrast-0" / "result.json").exists()
        and (arms / "base-0" / "result.json").exists()
        and not (arms / "last_layer-0").exists()
    )

    trained, train = [], running.train
    monkeypatch.setattr(
        running, "train", lambda config, resume: trained.append(Path(config.output).name) or train(config, resume)
    )
    study_some(inputs, output)
    assert trained[-1] == "last_layer-0" and "base-0" not in trained
    of_whole = measured(whole)
    for run, numbers in measured(output).items():
        assert numbers == of_whole[run], run
    trained.clear()
    study_some(inputs, output)
    assert trained == []


def test_a_signal_saves_the_run_and_names_the_command(inputs, tmp_path):
    output = tmp_path / "stopped"
    paths = [inputs.encoder, inputs.text_encoder, inputs.captioner, inputs.answerer, inputs.captions, inputs.questions]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # Sent by itself in a step: a run of six steps is over before another process could.
    sends = "import os, signal; from qformers.training import loop; old = loop.set_learning_rate\n"
    sends += "loop.set_learning_rate = lambda *a: os.kill(os.getpid(), signal.SIGINT) or old(*a)\n"
    done = subprocess.run(
        [sys.executable, "-c", sends + CHILD, output, *paths], env=environment, capture_output=True, text=True
    )
    assert "TrainingStoppedError: contrast, seed 0: its state is saved; go on with qformers study" in done.stderr
    assert list((output / "arms" / "contrast-0" / "checkpoints").iterdir())


def test_a_folder_of_other_settings_and_unknown_questions_are_refused(whole, inputs, tmp_path, capsys):
    assert main(["study", str(whole), "--size", "quick"]) == 1
    assert re.fullmatch(r"error: .*whole holds a study of size tiny: .*\n", capsys.readouterr().err)
    assert main(["study", str(whole), "--size", "tiny", "--language_model", "t5"]) == 1
    assert "holds a study of language_model smollm2" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no study"):
        run_study(tmp_path, "tiny", inputs=inputs)
    assert main(["study", str(tmp_path / "new"), "--questions", "1,9"]) == 1
    assert "question 9 is not one of the study's: they are 1 to 8" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "new"), "--questions", "one"]) == 1
    assert "give numbers such as 1,3,7" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="seeds is 0"):
        run_study(tmp_path / "new", "tiny", seeds=0, inputs=inputs)
    assert not (tmp_path / "new").exists()
