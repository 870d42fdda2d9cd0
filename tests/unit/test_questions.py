"""Questions in every published layout, and what is said of those that cannot be asked."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qformers.data.config import SourceConfig
from qformers.data.questions import open_questions
from qformers.data.sources import open_source
from qformers.errors import ConfigError, DataError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def write(path: Path, content) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def vqa(tmp_path) -> SourceConfig:
    """Three questions as VQAv2 and OK-VQA publish them."""
    for number in (9, 25):
        picture(tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg")
    questions = [
        {"image_id": image, "question": f"what is {number}?", "question_id": number}
        for number, image in ((9000, 9), (9001, 9), (25000, 25))
    ]
    annotations = [
        {
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": "cat",
            "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)],
        }
        for row in reversed(questions)
    ]
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    return SourceConfig(
        path=write(tmp_path / "questions.json", header | {"task_type": "Open-Ended", "questions": questions}),
        annotations=write(tmp_path / "annotations.json", header | {"annotations": annotations}),
        images=str(tmp_path / "train2014"),
    )


def change(path: str | None, edit) -> None:
    assert path is not None
    content = json.loads(Path(path).read_text())
    edit(content)
    Path(path).write_text(json.dumps(content))


def test_vqav2_and_ok_vqa(vqa):
    questions = open_questions(vqa)
    row = questions.records[2]
    assert questions.left_out == {} and len(questions.records) == 3
    assert row["question"] == "what is 25000?" and row["question_id"] == "25000" and row["image_id"] == "25"
    assert row["image"]["path"].endswith("COCO_train2014_000000000025.jpg")
    assert row["answers"] == ["cat"] * 10
    assert (row["question_type"], row["answer_type"]) == ("what is", "other")


def test_pictures_named_otherwise(vqa, tmp_path):
    for number in (9, 25):
        picture(tmp_path / "2017" / f"{number:012d}.jpg")
    named = SourceConfig(
        vqa.path, annotations=vqa.annotations, images=str(tmp_path / "2017"), image_name="{id:0>12}.jpg"
    )
    assert len(open_questions(named).records) == 3
    with pytest.raises(DataError, match=r"write \{id\}"):
        open_questions(SourceConfig(vqa.path, annotations=vqa.annotations, image_name="{number}.jpg"))


def test_gqa(tmp_path):
    picture(tmp_path / "images" / "2386621.jpg")
    row = {
        "question": "Is it overcast?", "imageId": "2386621", "answer": "no", "fullAnswer": "No, it is clear.",
        "isBalanced": True, "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
    }  # fmt: skip
    found = open_questions(
        SourceConfig(write(tmp_path / "testdev_balanced.json", {"02930152": row}), images=str(tmp_path / "images"))
    )
    assert found.records[0]["question_id"] == "02930152"
    assert found.records[0]["answers"] == ["no"]
    assert (found.records[0]["question_type"], found.records[0]["answer_type"]) == ("global", "verify")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_of_ones_own(tmp_path, name):
    picture(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": " what? ", "answers": ["cat", "dog"], "question_type": "what"},
        {"image": "a.png", "question": "who?", "answer": "me", "question_id": "second"},
    ]
    records = open_questions(SourceConfig(write(tmp_path / name, rows))).records
    assert records["question"][:] == ["what?", "who?"] and records["answers"][:] == [["cat", "dog"], ["me"]]
    assert records["question_id"][:] == ["0", "second"] and records["image_id"][:] == ["a.png", "a.png"]


def test_what_cannot_be_asked_is_counted_named_and_left_out(tmp_path, caplog):
    picture(tmp_path / "a.png")
    good = {"image": "a.png", "question": "what?", "answers": ["cat"]}
    rows = [
        good,
        {**good, "image": None},
        {"question": "where?", "answers": ["here"]},
        {**good, "question": "  "},
        {**good, "question": None},
        {**good, "answers": [3, "cat"]},
        {**good, "answers": {"a": "cat"}},
        {**good, "answers": []},
        {**good, "answers": [" "]},
        {**good, "image": "gone.png"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        found = open_questions(SourceConfig(path))
    assert len(found.records) == 1 and found.count_left_out == 9
    assert {why: count for why, (count, _) in found.left_out.items()} == {
        "have no picture": 2,
        "have an empty question": 2,
        "have answers that are not strings": 2,
        "have no answer": 1,
        "have an empty answer": 1,
        "have a picture that does not exist": 1,
    }
    (said,) = caplog.messages
    assert "9 of 10 rows left out" in said and "gone.png" in said and "question 1" in said and "\n" not in said
    assert len(open_questions(SourceConfig(path), need_answers=False).records) == 2


def test_annotations_and_questions_that_do_not_meet(vqa, caplog):
    change(vqa.annotations, lambda content: content["annotations"].pop())
    change(vqa.annotations, lambda content: content["annotations"].append({"question_id": 77, "answers": []}))
    change(vqa.path, lambda content: content["questions"][1].update(image_id=404))
    with caplog.at_level(logging.WARNING):
        found = open_questions(vqa)
    assert len(found.records) == 1
    assert {why: count for why, (count, _) in found.left_out.items()} == {
        "have no answer": 1,
        "have a picture that does not exist": 1,
        "are annotations without a question": 1,
    }
    assert "question 77" in caplog.messages[0] and "000000000404.jpg" in caplog.messages[0]


def test_a_picture_that_is_put_there_later_is_found(vqa, tmp_path):
    change(vqa.path, lambda content: content["questions"][0].update(image_id=11))
    assert len(open_questions(vqa).records) == 2
    picture(tmp_path / "train2014" / "COCO_train2014_000000000011.jpg")
    assert len(open_questions(vqa).records) == 3


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("q.json", '{"questions": [', "not JSON"),
        ("q.json", '{"images": []}', r"unknown layout \(images\)"),
        ("q.json", "[]", "holds no questions"),
        ("q.json", "[1]", "row 1 is no object"),
        ("q.jsonl", '{"image": "a"}\nnonsense\n', "line 2 is not a JSON object"),
        ("q.jsonl", '{"image": "a", "question": "what?"}\n', "none of 1 questions can be asked"),
    ],
)
def test_files_that_hold_none_are_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said) as refused:
        open_questions(SourceConfig(str(tmp_path / name)))
    assert "\n" not in str(refused.value) and name in str(refused.value)


def test_settings_of_captions_and_of_questions_are_kept_apart(vqa):
    with pytest.raises(ConfigError, match="has no splits"):
        open_questions(replace(vqa, split="train"))
    for settings in ({"stream": True}, {"weight": 2.0}):
        with pytest.raises(ConfigError, match="stream and weight are of captions"):
            open_questions(replace(vqa, **settings))
    with pytest.raises(ConfigError, match="are of questions: set task to vqa"):
        open_source(vqa)


def test_missing_files_and_foreign_annotations(vqa, tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        open_questions(SourceConfig(str(tmp_path / "none.json")))
    with pytest.raises(DataError, match="no such file"):
        open_questions(SourceConfig(vqa.path, annotations=str(tmp_path / "none.json")))
    with pytest.raises(DataError, match="holds no"):
        open_questions(SourceConfig(vqa.path, annotations=vqa.path))
