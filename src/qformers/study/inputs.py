"""What the study reads: frozen models, the demo's captions and easy-VQA's questions, cut into parts.

    train.jsonl            what the arms learn
    noisy.jsonl            scenes that only the arms about CapFilt see, one caption each, some swapped
    clean.jsonl            other scenes with true captions: CapFilt's lowest score is what most of them reach
    held_out.jsonl         concepts and scenes for retrieval
    held_out_scenes.jsonl  of these the scenes: captions
    loss.jsonl             the first of them: held-out losses
    questions.jsonl        questions to learn, about pictures of their own
    asked.jsonl            questions to answer, about others

No arm learns a picture of `clean`, `held_out` or `asked`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qformers.demo.recipe import LanguageModelName
from qformers.errors import DataError
from qformers.study.config import SWAPPED, StudySize

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Folders of the frozen models, and of two data sets.

    `captioner` is the language model that says captions, `answerer` the one that answers questions. `captions` has
    train.jsonl, held_out_concepts.jsonl, held_out_scenes.jsonl and validation_scenes.jsonl as `qformers data demo`
    writes them, `questions` train.jsonl and validation.jsonl as `qformers data questions` writes easy-VQA's.
    """

    encoder: Path
    text_encoder: Path
    captioner: Path
    answerer: Path
    captions: Path
    questions: Path


def demo_inputs(output: Path, size: StudySize, captioner: LanguageModelName) -> Inputs:
    """The demo's own, fetched once, its data sets built under `output`.

    Raises:
        DataError: the assets cannot be had, or `output` holds data of other settings.
    """
    from qformers.demo.assets import fetch_pictures
    from qformers.demo.dataset import build_demo_dataset
    from qformers.demo.dinov2 import dinov2_folder, minilm_folder
    from qformers.demo.questions import write_easy_vqa
    from qformers.demo.small_t5 import caption_t5_folder
    from qformers.demo.smollm2 import smollm2_folder

    data, questions = build_demo_dataset(fetch_pictures()[0], output / "captions", size.demo.data), output / "questions"
    if not questions.exists():
        write_easy_vqa(questions)
    speaker, vocabulary = smollm2_folder(), minilm_folder()
    answerer = speaker
    if captioner == "t5":
        captions = [caption for row in _read(data.folder, "train") for caption in row["captions"]]
        speaker = caption_t5_folder(captions, vocabulary, output / "t5", seed=0, steps=size.demo.t5_steps)
    return Inputs(dinov2_folder(), vocabulary, speaker, answerer, data.folder, questions)


def write_parts(inputs: Inputs, folder: Path, size: StudySize) -> None:
    """Cut the data sets into the files above, with absolute paths of pictures.

    Raises:
        DataError: there are fewer scenes than `size` asks for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, concepts, scenes, validation = (
        _read(inputs.captions, name) for name in ("train", "held_out_concepts", "held_out_scenes", "validation_scenes")
    )
    web = [row for row in train if row["kind"] == "scene"][-size.web_scenes :]
    if len(web) < size.web_scenes or len(scenes) < size.held_out_pictures:
        raise DataError(
            f"{inputs.captions}: has {len(web)} training scenes and {len(scenes)} held-out ones, "
            f"needed are {size.web_scenes} and {size.held_out_pictures}"
        )
    kept = {row["image_id"] for row in web}
    scenes = scenes[: size.held_out_pictures]
    questions, asked = _read(inputs.questions, "train"), _read(inputs.questions, "validation")
    parts = {
        "train": [row for row in train if row["image_id"] not in kept],
        "noisy": plant_noise(web),
        "held_out": concepts[: size.held_out_pictures] + scenes,
        "held_out_scenes": scenes,
        "loss": scenes[: size.loss_pictures],
        "clean": [{**row, "caption": row["captions"][0]} for row in validation],
        "questions": _about_first_pictures(questions, size.training_question_pictures),
        "asked": _about_first_pictures(asked, size.asked_pictures),
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plant_noise(scenes: Rows) -> Rows:
    """One caption of each scene, those of a share SWAPPED of them moved on by one among themselves.

    `true` is the scene's own caption, `swapped` whether it has another's.
    """
    draw = np.random.default_rng(0)
    rows = [
        {"image": row["image"], "image_id": row["image_id"], "group": row["group"]}
        | {"true": str(draw.choice(row["captions"]))}
        for row in scenes
    ]
    moved = draw.permutation(len(rows))[: round(SWAPPED * len(rows))]
    captions = [row["true"] for row in rows]
    for place, other in zip(moved, np.roll(moved, -1), strict=True):
        captions[place] = rows[other]["true"]
    return [
        {**row, "caption": caption, "swapped": caption != row["true"]}
        for row, caption in zip(rows, captions, strict=True)
    ]


def _about_first_pictures(rows: Rows, pictures: int) -> Rows:
    first = set(list(dict.fromkeys(row["image_id"] for row in rows))[:pictures])
    return [row for row in rows if row["image_id"] in first]


def _read(folder: Path, name: str) -> Rows:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "image": str(folder.resolve() / row["image"])} for row in rows]
