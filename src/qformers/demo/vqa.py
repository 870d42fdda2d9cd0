"""The demo's questions: easy-VQA, answered by a Q-Former that reads the question, and by its controls.

    data/              train.jsonl, validation.jsonl, test.jsonl
    blank/             the same questions, every one about one white picture
    <arm>/             a training run each

| arm | the queries read | picture |
|---|---|---|
| qformer | the question | its own |
| unconditioned | a text without words | its own |
| question_only | the question | white |

All start from the demo's stage-1 run, train as many weights for as many steps on the same draws, and hand the language
model the question. What the majority of training answers says is the fourth method.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from qformers.convert.run import open_model
from qformers.data.config import SourceConfig
from qformers.data.questions import open_questions
from qformers.data.transforms import transform_for
from qformers.demo.questions import write_easy_vqa
from qformers.demo.recipe import DemoSize, demo_vqa_recipe
from qformers.evaluation.answering import Answered, answer_questions
from qformers.evaluation.captioning import Captioner
from qformers.evaluation.vqa_metrics import score_answers
from qformers.models.config import GenerationSettings, QFormerReads
from qformers.models.tensors import WEIGHTS_FILE
from qformers.training.config import TrainConfig
from qformers.training.features import precompute
from qformers.training.loop import train


@dataclass(frozen=True)
class Arm:
    """What the queries of a training run read, and in which folder its questions and pictures are."""

    title: str
    reads: QFormerReads
    pictures: str


ARMS = {
    "qformer": Arm("Q-Former that reads the question", "question", "data"),
    "unconditioned": Arm("Q-Former that does not", "empty", "data"),
    "question_only": Arm("question only, the picture is blank", "question", "blank"),
}
BLANK_PX = 64  # as easy-VQA's pictures


def training_phase(arm: str) -> str:
    """What the training of an arm is called where times are kept."""
    return f"train_vqa_{arm}"


@dataclass(frozen=True)
class ArmAnswers:
    """What an arm answers to the questions of the test set, in their order, and how many weights it trained."""

    answers: list[str]
    trained_parameters: int


@dataclass(frozen=True)
class DemoAnswers:
    """All arms on the test set, whose rows `rows` are, and what most training answers say."""

    rows: list[dict[str, Any]]
    arms: dict[str, ArmAnswers]
    majority: str

    def metrics(self) -> dict[str, dict[str, float]]:
        """Of each method, accuracy over all questions and over those of each type, and the weights it trained."""
        people, types = [row["answers"] for row in self.rows], [row["answer_type"] for row in self.rows]
        methods = {**self.arms, "majority": ArmAnswers([self.majority] * len(self.rows), 0)}
        return {
            name: {
                **score_answers(said.answers, people, {"answer_type": types}, "exact"),
                "trained_parameters": said.trained_parameters,
            }
            for name, said in methods.items()
        }


def prepare_questions(folder: Path, size: DemoSize) -> None:
    """Write easy-VQA into `folder`, with and without its pictures, as much of its test set as `size` asks for."""
    if not (folder / "data").exists():
        write_easy_vqa(folder / "data")
    (folder / "blank").mkdir(exist_ok=True)
    Image.new("RGB", (BLANK_PX, BLANK_PX), "white").save(folder / "blank" / "blank.png")
    for part in ("train", "test"):
        rows = read_rows(folder / "data" / f"{part}.jsonl")
        if part == "test" and size.vqa_test_pictures is not None:
            shown = list(dict.fromkeys(row["image_id"] for row in rows))[: size.vqa_test_pictures]
            rows = [row for row in rows if row["image_id"] in shown]
            _write_rows(folder / "data" / "test.jsonl", rows)
        blank = [{**row, "image": "blank.png", "image_id": "blank"} for row in rows]
        _write_rows(folder / "blank" / f"{part}.jsonl", blank)


def train_arm(folder: Path, size: DemoSize, stage1: TrainConfig, language_model: Path, arm: str) -> TrainConfig:
    """Precompute the pictures' features and train, or go on; the run's settings."""
    pictures = ARMS[arm].pictures
    recipe = demo_vqa_recipe(
        size,
        stage1,
        language_model=language_model,
        source=folder / pictures / "train.jsonl",
        features=folder / "features" / pictures,
        output=folder / arm,
        reads=ARMS[arm].reads,
    )
    precompute(recipe)
    train(recipe, resume="auto")
    return recipe


def answer_arm(folder: Path, recipe: TrainConfig, arm: str) -> ArmAnswers:
    """Greedy answers of a trained arm to the test set; kept beside its model, and found there again for its weights."""
    model, kept = Path(recipe.output) / "model", Path(recipe.output) / "answers.json"
    # By content: to go on with a run that has ended writes the same weights once more.
    weights = hashlib.sha256((model / WEIGHTS_FILE).read_bytes()).hexdigest()
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8"))).get("weights") == weights:
        return ArmAnswers(found["answers"], found["trained_parameters"])
    pictures = ARMS[arm].pictures
    source = SourceConfig(path=str(folder / pictures / "test.jsonl"))
    shown = replace(recipe.data, train=[source], features=str(folder / "features" / f"{pictures}_test"))
    answered, trained = greedy_answers(replace(recipe, data=shown))
    said = {"weights": weights, "answers": answered.answers, "trained_parameters": trained}
    kept.write_text(json.dumps(said), encoding="utf-8")
    return ArmAnswers(answered.answers, trained)


def greedy_answers(shown: TrainConfig) -> tuple[Answered, int]:
    """What a trained run answers, and how many weights it trained.

    Args:
        shown: the run's recipe, with the questions and the folder of their pictures' features in place of those that it
            was trained on; features that are not there are precomputed.
    """
    captioner = Captioner.of(open_model(Path(shown.output) / "model"))
    answered = answer_questions(
        captioner,
        open_questions(shown.data.train[0]).records,
        transform_for(captioner.model.vision_encoder, shown.data.transform),
        GenerationSettings.for_answers(num_beams=1, length_penalty=1.0),
        features=precompute(shown),
    )
    return answered, sum(weight.numel() for weight in captioner.model.parameters() if weight.requires_grad)


def gather_answers(folder: Path, arms: dict[str, ArmAnswers]) -> DemoAnswers:
    """The answers of all arms beside the majority of the training answers."""
    said = Counter(row["answers"][0] for row in read_rows(folder / "data" / "train.jsonl"))
    return DemoAnswers(read_rows(folder / "data" / "test.jsonl"), arms, said.most_common(1)[0][0])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
