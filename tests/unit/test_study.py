"""The study's rule, its tables, and what it plants, without training anything."""

from __future__ import annotations

import json

import pytest

from qformers.study import arms
from qformers.study.arms import with_their_starts
from qformers.study.config import SIZES
from qformers.study.inputs import plant_noise
from qformers.study.page import Circumstances, mean_and_spread, page, write_study
from qformers.study.questions import Comparison, questions_of, verdict
from qformers.study.running import seconds_per_step

HOW = Circumstances("qformers study out", "a frozen SmolLM2-135M", "abc1234", "2 cores", "2026-01-01")


def result(**metrics: float) -> dict:
    return {"metrics": metrics, "curve": [], "cost": {"seconds": 1.0, "seconds_per_step": 0.5, "step_gflop": 3.0}}


@pytest.mark.parametrize(
    "differences, said",
    [
        ([0.1, 0.2, 0.01], "agrees"),
        ([-0.1, -0.2, -0.01], "does not agree"),
        ([0.1, 0.2, -0.01], "cannot tell"),
        ([0.1, 0.2, 0.0], "cannot tell"),
        ([0.0, 0.0, 0.0], "cannot tell"),
        ([0.1, 0.2], "cannot tell"),
        ([], "cannot tell"),
    ],
)
def test_the_verdict_needs_three_seeds_of_one_sign(differences, said):
    assert verdict(dict(enumerate(differences))) == said


def test_a_lower_loss_is_better_and_seeds_are_compared_with_themselves():
    values = {
        "captions": {0: {"lm": 2.0}, 1: {"lm": 3.0}, 2: {"lm": 1.0}},
        "captions_mlp": {1: {"lm": 3.5}, 0: {"lm": 1.5}},
    }
    comparison = Comparison(arms.CAPTIONS, arms.BRIDGES[1], "lm")
    assert comparison.differences(values) == {0: -0.5, 1: 0.5}
    both = {"base": {0: {"reranked_mean_recall": 0.5, "mean_recall": 0.25}}}
    assert Comparison(arms.BASE, arms.BASE, "reranked_mean_recall", "mean_recall").differences(both) == {0: 0.25}


def test_the_page_says_how_far_it_has_got_and_writes_means_with_their_spread(tmp_path):
    assert mean_and_spread([0.25]) == "0.250" and mean_and_spread([]) == "–"
    assert mean_and_spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    question = questions_of(SIZES["full"])[1]
    metrics = [dict.fromkeys(question.metrics, value) for value in (0.1, 0.2, 0.3)]
    found = {"base": {seed: result(**metrics[seed]) for seed in range(3)}, "no_itg": {0: result(**metrics[0])}}
    written = page([question], found, 3, 61.0, HOW)
    assert "| ITC + ITM + ITG | 0.200 ± 0.100 |" in written
    assert "| ITC + ITM | 0.100 | 0.100 | 0.100 | 0.100 | 1 |" in written
    assert "Unfinished: 4 of 6 runs so far" in written and "**cannot tell** (by seed: +0.000)" in written
    found["no_itg"] |= {1: result(**metrics[0]), 2: result(**metrics[0])}
    found["base"][0] = result(**metrics[1])
    write_study(tmp_path, [question], found, 3, 61.0, HOW)
    assert "**agrees** (by seed: +0.100, +0.100, +0.200)" in (tmp_path / "study.md").read_text()
    assert "1 min 01 s in all" in (tmp_path / "study.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"]["1"][0]["verdict"] == "agrees"


def test_seconds_of_a_step_come_from_the_rows_that_were_timed():
    rows = [{"step": 5, "images_per_second": 8.0}, {"step": 6, "validation/lm": 2.0}, {"images_per_second": 4.0}]
    assert seconds_per_step([*rows, {"images_per_second": 2.0}], batch_size=16) == {"seconds_per_step": 4.0}


@pytest.mark.parametrize("size", SIZES)
def test_questions_draw_their_figures_from_any_part_of_the_results(size, tmp_path):
    questions = list(questions_of(SIZES[size]).values())
    write_study(tmp_path, questions, {}, 3, 0.0, HOW)
    assert "Unfinished: 0 of" in (tmp_path / "study.md").read_text()
    assert [question.number for question in questions] == list(range(1, 9))


def test_what_an_arm_goes_on_from_comes_before_it_and_once():
    order = with_their_starts([arms.CLEANED, arms.UNTRAINED, arms.READS_QUESTION, arms.NOISY])
    first = [arms.CONTRAST, arms.BASE, arms.CAPTIONS]
    assert order == [*first, arms.CLEANED, arms.UNTRAINED, arms.READS_QUESTION, arms.NOISY]
    shared = [arm for question in questions_of(SIZES["full"]).values() for arm in question.arms]
    assert len(with_their_starts(shared)) == len({arm.name for arm in shared}) == 19


def test_planted_noise_swaps_its_share_and_loses_no_caption():
    scenes = [
        {"image": f"{n}.jpg", "image_id": str(n), "group": str(n), "captions": [f"a {n}", f"the {n}"]}
        for n in range(40)
    ]
    rows = plant_noise(scenes)
    assert sum(row["swapped"] for row in rows) == 12
    assert sorted(row["caption"] for row in rows) == sorted(row["true"] for row in rows)
    assert all((row["caption"] != row["true"]) == row["swapped"] for row in rows)
    assert all(row["true"] in scene["captions"] for row, scene in zip(rows, scenes, strict=True))
    assert plant_noise(scenes) == rows
