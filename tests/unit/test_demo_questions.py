"""Questions made for scenes: true of the picture, and of no use without it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qformers.data.config import SourceConfig
from qformers.data.questions import open_questions
from qformers.demo import questions
from qformers.demo.config import SceneQuestionsConfig
from qformers.demo.questions import CELLS, COLOURS, KINDS, ask_of, draw_things, write_easy_vqa, write_scene_questions
from qformers.demo.small_t5 import scene_example
from qformers.errors import ConfigError, DataError

NAMES = [f"thing{number}" for number in range(8)]
CHANCE = {"colour": 1 / 6, "where": 1 / 4, "what": 1 / 8, "how many": 1 / 3, "yes/no": 1 / 2}


def test_the_question_alone_does_not_give_the_answer_away():
    """For each question the answer it has most often in one half of the scenes, tried on the other half."""
    rng = np.random.default_rng(0)
    asked = [question for _ in range(6000) for question in ask_of(draw_things(NAMES, rng), NAMES, rng)]
    seen: dict[str, Counter] = defaultdict(Counter)
    for _, question, answer in asked[: len(asked) // 2]:
        seen[question][answer] += 1
    right = defaultdict(list)
    for kind, question, answer in asked[len(asked) // 2 :]:
        right[kind].append(seen[question].most_common(1)[0][0] == answer)
    assert right.keys() == CHANCE.keys()
    for kind, hits in right.items():
        assert np.mean(hits) == pytest.approx(CHANCE[kind], abs=0.03), kind


def test_answers_are_true_of_the_things():
    rng = np.random.default_rng(1)
    for _ in range(300):
        things = draw_things(NAMES, rng)
        assert sorted(thing.cell for thing in things) == [0, 1, 2, 3]
        at = {thing.cell: thing for thing in things}
        counts = Counter(thing.name for thing in things)
        answers = {kind: (question, answer) for kind, question, answer in ask_of(things, NAMES, rng)}
        question, colour = answers["colour"]
        (behind,) = [thing for thing in things if thing.name in question]
        assert behind.colour == colour
        question, place = answers["where"]
        (there,) = [thing for thing in things if thing.name in question]
        assert CELLS[there.cell] == place
        question, name = answers["what"]
        assert at[next(cell for cell, words in enumerate(CELLS) if words in question)].name == name
        question, times = answers["how many"]
        assert counts[question.split()[-1].rstrip("?")] == int(times)
        question, whether = answers["yes/no"]
        assert (question.split()[-1].rstrip("?") in counts) == (whether == "yes")


def test_what_the_t5_reads_says_what_it_is_to_answer():
    rng, kinds = np.random.default_rng(2), set()
    for _ in range(300):
        read, answer = scene_example(NAMES, KINDS, rng)
        captions, question = re.fullmatch(r"(.*)\. Question: (.*)\? Answer:", read).groups()
        facts = [re.fullmatch(r"(\w+) on (\w+) (.*)", caption).groups() for caption in captions.split(", ")]
        asked = question.split()[-1]
        if question.startswith("what colour"):
            assert [colour for name, colour, _ in facts if name == asked] == [answer]
        elif question.startswith("where"):
            assert [cell for name, _, cell in facts if name == asked] == [answer]
        elif question.startswith("what is in"):
            assert [name for name, _, cell in facts if question.endswith(f"the {cell}")] == [answer]
        elif question.startswith("how many"):
            assert sum(name == asked for name, _, _ in facts) == int(answer)
        else:
            assert (asked in [name for name, _, _ in facts]) == (answer == "yes")
        kinds.add(question.split()[1])
    assert kinds == {"colour", "is", "many", "there"}


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Stamps as their package lays them out: discs with a caption each."""
    for number, name in enumerate(["poodle", "owl", "canoe", "tent", "apple", "hammer", "violin", "rocket"]):
        image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((6, 4, 57, 43), fill=(30 * number, 90, 160, 255))
        path = tmp_path / "tuxpaint" / "animals" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        path.with_suffix(".txt").write_text(f"A {name}.\n")
    return {"tuxpaint": tmp_path / "tuxpaint"}


def test_scenes_are_drawn_as_asked_and_read_as_questions(folders, tmp_path):
    config = SceneQuestionsConfig(scenes=12, test_scenes=4, things=6, image_px=96)
    assert write_scene_questions(folders, tmp_path / "a", config) == {"train": 60, "test": 20}
    found = open_questions(SourceConfig(str(tmp_path / "a" / "train.jsonl")))
    assert found.left_out == {} and len(found.records) == 60
    cell_of, colours = {}, 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if row["answer_type"] == "where":
            cell_of[row["image_id"], row["question"].removeprefix("where is the ")] = CELLS.index(row["answers"][0])
    for row in rows:
        name = row["question"].removeprefix("what colour is behind the ")
        if row["answer_type"] == "colour" and (cell := cell_of.get((row["image_id"], name))) is not None:
            with Image.open(tmp_path / "a" / row["image"]) as image:
                corner = 48 * (cell % 2) + 6, 48 * (cell // 2) + 6
                seen = np.array(image.getpixel(corner))
            assert np.abs(seen - np.array(COLOURS[row["answers"][0]])).max() < 40
            colours += 1
    assert colours > 0
    captions = [json.loads(line) for line in (tmp_path / "a" / "test_captions.jsonl").read_text().splitlines()]
    assert [len(row["captions"]) for row in captions] == [4] * 4
    write_scene_questions(folders, tmp_path / "b", config)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    with pytest.raises(DataError, match="is there already"):
        write_scene_questions(folders, tmp_path / "a", config)
    with pytest.raises(ConfigError, match="9 things are asked for and 8 have cut-outs"):
        write_scene_questions(folders, tmp_path / "c", SceneQuestionsConfig(things=9))


def test_easy_vqa_keeps_its_answers(tmp_path, monkeypatch):
    rows = [["what color is the shape?", "blue", 0], ["is there a red shape?", "no", 0], ["what is it?", "circle", 0]]
    for part in ("train", "test"):
        (tmp_path / "data" / part / "images").mkdir(parents=True)
        (tmp_path / "data" / part / "questions.json").write_text(json.dumps(rows))
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / part / "images" / "0.png")
    monkeypatch.setattr(questions, "fetch", lambda key: tmp_path / "data")
    assert write_easy_vqa(tmp_path / "easy") == {"train": 3, "test": 3}
    records = open_questions(SourceConfig(str(tmp_path / "easy" / "train.jsonl"))).records
    assert records["answer_type"][:] == ["colour", "yes/no", "shape"]
    assert records["answers"][:] == [["blue"], ["no"], ["circle"]]


@pytest.mark.assets
def test_the_real_package(tmp_path):
    assert write_easy_vqa(tmp_path / "easy") == {"train": 34687, "validation": 3888, "test": 9673}
    found = open_questions(SourceConfig(str(tmp_path / "easy" / "test.jsonl")))
    assert found.left_out == {} and len(set(found.records["image_id"])) == 1000
