"""Does it help that the Q-Former reads the question? Questions about one of the four things of a scene.

    python benchmarks/scene_questions.py --output runs/scene_questions

A small T5 learns from text alone to answer questions about what captions say of a scene, and is frozen. A Q-Former
learns the same captions with the pictures (stage 1: ITC alone, then ITM beside it, whose business it is to read a text
closely). From that run two arms go on, with as many weights, for as many steps on the same draws: in one the queries
read the question, in the other a text without words; the T5 is asked the question in both. Accuracy (exact match) on
scenes that were never trained on, by kind of question, mean and spread over seeds, beside what the T5 answers from true
captions, which says how well it understands the question. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from qformers.data.config import SourceConfig
from qformers.demo.assets import fetch_pictures
from qformers.demo.config import SceneQuestionsConfig
from qformers.demo.dinov2 import dinov2_folder, minilm_folder
from qformers.demo.questions import ONE_THING, asked_caption, write_scene_questions
from qformers.demo.recipe import STANDARD, VQA_IMAGE_PX, demo_recipe, demo_vqa_recipe
from qformers.demo.small_t5 import scene_t5_folder
from qformers.demo.vqa import greedy_answers, read_rows
from qformers.evaluation.vqa_metrics import score_answers
from qformers.models.config import LanguageConfig, QFormerReads
from qformers.training.config import TrainConfig
from qformers.training.features import precompute
from qformers.training.loop import train

ARMS: tuple[QFormerReads, ...] = ("question", "empty")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--test_scenes", type=int, default=500)
    parser.add_argument("--things", type=int, default=SceneQuestionsConfig.things)
    parser.add_argument("--t5_steps", type=int, default=2000)
    parser.add_argument("--itc_steps", type=int, default=300, help="of stage 1 by ITC alone, in batches twice as large")
    parser.add_argument("--itm_steps", type=int, default=900, help="of stage 1 by ITC and ITM after them")
    parser.add_argument("--steps", type=int, default=500, help="of each arm")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    options = parser.parse_args()
    options.output = options.output.resolve()
    data = questions_of(options)
    language_model = answerer(options, data)
    stage1 = stage1_run(options, data)
    results = {
        arm: {
            str(seed): accuracy(answering_run(options, data, stage1, language_model, arm, seed), data)
            for seed in options.seeds
        }
        for arm in options.arms
    }
    found = {
        "T5, the caption asked about": text_accuracy(language_model, data, all_captions=False),
        "T5, all four captions": text_accuracy(language_model, data, all_captions=True),
        "commonest answer to such a question": majority(data),
        "arms": results,
    }
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


def questions_of(options: argparse.Namespace) -> Path:
    """The scenes; questions about one thing alone in train.jsonl and test.jsonl of the folder beside them."""
    data = options.output / "data"
    if not data.exists():
        config = SceneQuestionsConfig(options.scenes, options.test_scenes, options.things)
        # The vendors that the figures in docs/vqa.md are of.
        folders = {name: folder for name, folder in fetch_pictures()[0].items() if name != "twitter"}
        write_scene_questions(folders, data, config)
    for part in ("train", "test"):
        rows = [row for row in read_rows(data / f"{part}.jsonl") if row["answer_type"] in ONE_THING]
        (data / f"{part}_one_thing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


def names_of(data: Path) -> list[str]:
    """The things that stand in the scenes."""
    return sorted({row["answers"][0] for row in read_rows(data / "train.jsonl") if row["answer_type"] == "what"})


def answerer(options: argparse.Namespace, data: Path) -> Path:
    """The T5 that has learned to answer from captions."""
    return scene_t5_folder(
        names_of(data), ONE_THING, minilm_folder(), options.output / "t5", seed=0, steps=options.t5_steps
    )


def stage1_run(options: argparse.Namespace, data: Path) -> TrainConfig:
    """Stage 1 on the captions of the training scenes, in two runs; the second."""
    source = data / "train_captions.jsonl"
    size = replace(STANDARD, steps=options.itc_steps, itc_steps=options.itc_steps, batch_size=2 * options.batch_size)
    recipe = demo_recipe(
        replace(size, image_px=VQA_IMAGE_PX),
        encoder=dinov2_folder(),
        text_encoder=minilm_folder(),
        source=source,
        features=options.output / "features" / source.stem,
        output=options.output / "stage1_itc",
        seed=0,
    )
    itc_alone = replace(
        recipe,
        data=replace(recipe.data, train=[SourceConfig(path=str(source))]),
        # The paper's blocks and readout, as the figures in docs/vqa.md are of.
        model=replace(recipe.model, cross_attention_frequency=2, text_readout="cls"),
        # ITM is to read closely, and no word is new.
        optimiser=replace(recipe.optimiser, lr=4e-4, pretrained_lr_scale=1.0, text_lr_scale=1.0, shared_lr_scale=1.0),
    )
    with_itm = replace(
        itc_alone,
        output=str(options.output / "stage1"),
        start=itc_alone.output,
        steps=options.itm_steps,
        data=replace(itc_alone.data, batch_size=options.batch_size),
        objectives=replace(recipe.objectives, itc_steps=0, itm_fraction=1.0, itg=False, hard_negative_fraction=0.75),
        optimiser=replace(itc_alone.optimiser, warmup_steps=max(2, options.itm_steps // 10)),
    )
    precompute(itc_alone)
    for run in (itc_alone, with_itm):
        finish(run)
    return with_itm


def finish(recipe: TrainConfig) -> None:
    """Train, or go on from where it stopped."""
    if not (Path(recipe.output) / "model").exists():
        train(recipe, resume="auto")


def answering_run(
    options: argparse.Namespace, data: Path, stage1: TrainConfig, language_model: Path, arm: QFormerReads, seed: int
) -> TrainConfig:
    """An arm, trained."""
    recipe = demo_vqa_recipe(
        replace(STANDARD, vqa_steps=options.steps),
        stage1,
        language_model=language_model,
        source=data / "train_one_thing.jsonl",
        features=options.output / "features" / "train_one_thing",
        output=options.output / f"{arm}_{seed}",
        reads=arm,
    )
    recipe = replace(
        recipe,
        seed=seed,
        data=replace(recipe.data, batch_size=options.batch_size),
        # All weights at the rate that woke ITM: the question is read by what came from the BERT.
        optimiser=replace(recipe.optimiser, lr=stage1.optimiser.lr, pretrained_lr_scale=1.0),
    )
    precompute(recipe)
    finish(recipe)
    return recipe


def accuracy(recipe: TrainConfig, data: Path) -> dict[str, float]:
    """Greedy answers of an arm to the test questions; kept beside it."""
    kept = Path(recipe.output) / "accuracy.json"
    if not kept.exists():
        source = SourceConfig(path=str(data / "test_one_thing.jsonl"))
        features = str(Path(recipe.output).parent / "features" / "test_one_thing")
        answered, _ = greedy_answers(replace(recipe, data=replace(recipe.data, train=[source], features=features)))
        kept.write_text(json.dumps(answered.metrics("exact")), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


@torch.inference_mode()
def text_accuracy(folder: Path, data: Path, all_captions: bool) -> dict[str, float]:
    """The T5 on the test questions with true captions for visual prompts: all four, or the one asked about."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    captions = {row["image_id"]: row["captions"] for row in read_rows(data / "test_captions.jsonl")}
    rows, answers = read_rows(data / "test_one_thing.jsonl"), []
    texts = []
    for row in rows:
        known = captions[row["image_id"]]
        said = known if all_captions else [asked_caption(row["question"], known)]
        texts.append(f"{', '.join(said)}. {LanguageConfig.question_template.format(row['question'])}")
    for start in range(0, len(texts), 64):
        read = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        said = model.generate(
            input_ids=read["input_ids"], attention_mask=read["attention_mask"], max_new_tokens=10, do_sample=False
        )
        answers += [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    return scored(rows, answers)


def majority(data: Path) -> dict[str, float]:
    """The commonest training answer to each kind of question."""
    train, test = read_rows(data / "train_one_thing.jsonl"), read_rows(data / "test_one_thing.jsonl")
    said = {
        kind: Counter(row["answers"][0] for row in train if row["answer_type"] == kind).most_common(1)[0][0]
        for kind in ONE_THING
    }
    return scored(test, [said[row["answer_type"]] for row in test])


def scored(rows: list[dict], answers: list[str]) -> dict[str, float]:
    """Exact match over all and by kind."""
    types = {"answer_type": [row["answer_type"] for row in rows]}
    return score_answers(answers, [row["answers"] for row in rows], types, "exact")


def table(found: dict) -> str:
    """A Markdown table of the results: mean (smallest to largest) over the seeds."""
    columns = ["accuracy", *(f"answer_type/{kind}" for kind in ONE_THING)]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in found.items():
        if name != "arms":
            lines.append(f"| {name} | " + " | ".join(f"{figures[column]:.3f}" for column in columns) + " |")
    for arm, seeds in found["arms"].items():
        cells = []
        for column in columns:
            values = [figures[column] for figures in seeds.values()]
            cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| the queries read: {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
