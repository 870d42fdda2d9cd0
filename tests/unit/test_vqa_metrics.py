"""VQA accuracy: the official evaluator's own values (tests/golden/make_vqa_golden.py), and cases worked by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from qformers.evaluation.vqa_metrics import exact_match, fitting_metric, normalise_answer, score_answers, vqa_accuracy

GOLDEN = json.loads(gzip.decompress((Path(__file__).parents[1] / "golden" / "vqa.json.gz").read_bytes()))
CASES = GOLDEN["cases"]


def test_every_golden_answer_has_the_official_accuracy():
    assert len(CASES) >= 300
    for case in CASES:
        assert normalise_answer(case["answer"]) == case["normal"], case
        assert 100 * vqa_accuracy(case["answer"], case["people"]) == pytest.approx(case["accuracy"], abs=1e-9), case
    assert {round(case["accuracy"]) for case in CASES} == {0, 30, 60, 90, 100}


def test_the_means_by_type_are_official_too():
    types = {name: [case[name] for case in CASES] for name in ("answer_type", "question_type")}
    said, people = [case["answer"] for case in CASES], [case["people"] for case in CASES]
    metrics = score_answers(said, people, types, "vqa")
    official = GOLDEN["accuracy"]
    assert 100 * metrics.pop("accuracy") == pytest.approx(official["overall"], abs=1e-9)
    expected = {f"answer_type/{name}": value for name, value in official["perAnswerType"].items()}
    expected |= {f"question_type/{name}": value for name, value in official["perQuestionType"].items()}
    assert {name: 100 * value for name, value in metrics.items()} == pytest.approx(expected, abs=1e-9)


def test_leave_one_out_by_hand():
    """Three of ten agree: whoever is one of them leaves two matches, so 3 x 2/3 + 7 x 1, a tenth of it."""
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("cat", ["cat"] * 4 + ["dog"] * 6) == 1
    assert vqa_accuracy("", ["cat"] * 10) == 0
    assert vqa_accuracy("", [""] * 10) == 1


def test_people_who_agree_keep_their_punctuation():
    """The official code spares them: "p.m." by all ten is met by no answer, since an answer loses its periods."""
    assert vqa_accuracy("p.m.", ["p.m."] * 10) == 0
    assert vqa_accuracy("p.m.", ["p.m."] * 9 + ["pm"]) == 1


def test_exact_match_and_which_metric_fits():
    assert exact_match("The Red.", ["red"]) == 1 and exact_match("reddish", ["red"]) == 0
    assert fitting_metric([["a"] * 10, ["b"] * 10]) == "vqa"
    assert fitting_metric([["a"] * 10, ["b"]]) == fitting_metric([]) == "exact"


def test_a_type_that_is_missing_is_unknown_and_kinds_without_any_are_left_out():
    types = {"answer_type": ["yes/no", "", "never seen before"], "question_type": ["", "", ""]}
    metrics = score_answers(["yes", "red", "x"], [["yes"], ["blue"], ["x"]], types, "exact")
    assert metrics == {
        "accuracy": pytest.approx(2 / 3),
        "answer_type/yes/no": 1.0,
        "answer_type/unknown": 0.0,
        "answer_type/never seen before": 1.0,
    }
