from __future__ import annotations

import json

import pytest
from PIL import Image

from qformers.demo import questions
from qformers.demo.recipe import SIZES
from qformers.demo.vqa import ArmAnswers, DemoAnswers, gather_answers, prepare_questions, read_rows

ROWS = [
    ["what color is the shape?", "blue", 0], ["is there a red shape?", "no", 0], ["what is it?", "circle", 1],
    ["is there a circle?", "no", 2], ["is there a box?", "yes", 3],
]  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / "data" / part / "images").mkdir(parents=True)
        (tmp_path / "data" / part / "questions.json").write_text(json.dumps(ROWS * (1 + (part == "train"))))
        for number in range(4):
            Image.new("RGB", (64, 64)).save(tmp_path / "data" / part / "images" / f"{number}.png")
    monkeypatch.setattr(questions, "fetch", lambda key: tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize(("size", "asked"), [("standard", 5), ("quick", 5)])
def test_the_blank_questions_are_the_same_about_one_white_picture(package, size, asked):
    folder = package / "vqa"
    prepare_questions(folder, SIZES[size])
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    prepare_questions(folder, SIZES[size])  # a demo that goes on
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    for part in ("train", "test"):
        shown, blank = (read_rows(folder / name / f"{part}.jsonl") for name in ("data", "blank"))
        assert {row["image"] for row in blank} == {"blank.png"} and len({row["image_id"] for row in blank}) == 1
        for seen, unseen in zip(shown, blank, strict=True):
            assert [seen[key] for key in ("question", "answers", "question_id")] == [
                unseen[key] for key in ("question", "answers", "question_id")
            ]
    assert len(read_rows(folder / "data" / "test.jsonl")) == asked
    assert Image.open(folder / "blank" / "blank.png").getextrema() == ((255, 255),) * 3


def test_metrics_set_every_method_beside_the_majority(package):
    folder = package / "vqa"
    prepare_questions(folder, SIZES["quick"])
    found = gather_answers(folder, {"qformer": ArmAnswers(["blue", "yes", "circle", "no", "yes"], 7)})
    assert found.majority == "no"
    metrics = found.metrics()
    assert metrics["qformer"] == {
        "accuracy": pytest.approx(0.8), "answer_type/colour": 1.0, "answer_type/shape": 1.0,
        "answer_type/yes/no": pytest.approx(2 / 3), "trained_parameters": 7,
    }  # fmt: skip
    assert metrics["majority"]["accuracy"] == pytest.approx(0.4)
    assert metrics["majority"]["answer_type/colour"] == 0
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        DemoAnswers(found.rows, {"qformer": ArmAnswers(["blue"], 7)}, "no").metrics()
