"""Commands that check, prepare and make data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance, recipe_options, source_options


def _validate_options(parser: ArgumentParser) -> None:
    parser.add_argument("sources", type=str, nargs="+", metavar="SOURCE", help="Files or folders to check.")
    source_options(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON, one report a line.")


def _validate(options: Namespace) -> None:
    from rich.console import Console

    from qformers.data.config import SourceConfig
    from qformers.data.validate import validate_source

    for path in options.sources:
        report = validate_source(instance(SourceConfig, options, path=path))
        if options.json:
            print(json.dumps({"source": path, **report.as_dict()}, ensure_ascii=False))
        else:
            Console().print(path, report.table(), sep="\n", highlight=False, markup=False)


def _features(options: Namespace) -> None:
    from qformers.training.config import TrainConfig
    from qformers.training.features import precompute

    precompute(instance(TrainConfig, options))


def _data_demo_options(parser: ArgumentParser) -> None:
    from qformers.demo.config import DemoDataConfig

    parser.add_argument("--output", type=str, required=True, help="Folder to build the data set in.")
    parser.add_class_arguments(DemoDataConfig, None)


def _data_demo(options: Namespace) -> None:
    from qformers.demo.assets import fetch_pictures
    from qformers.demo.config import DemoDataConfig
    from qformers.demo.dataset import build_demo_dataset

    folders, _ = fetch_pictures()
    built = build_demo_dataset(folders, Path(options.output), instance(DemoDataConfig, options))
    for kind, count in built.counts.items():
        print(f"{kind:<24} {count}")


def _questions_options(parser: ArgumentParser) -> None:
    from qformers.demo.config import SceneQuestionsConfig

    parser.add_argument("--output", type=str, required=True, help="New folder for train.jsonl and test.jsonl.")
    parser.add_argument(
        "--kind",
        type=Literal["easy_vqa", "scenes"],
        default="easy_vqa",
        help="easy_vqa: one shape a picture, from its package; scenes: four things on coloured cards, made here.",
    )
    parser.add_class_arguments(SceneQuestionsConfig, None)


def _questions(options: Namespace) -> None:
    from qformers.demo.assets import fetch_pictures
    from qformers.demo.config import SceneQuestionsConfig
    from qformers.demo.questions import write_easy_vqa, write_scene_questions

    output = Path(options.output)
    if options.kind == "easy_vqa":
        counts = write_easy_vqa(output)
    else:
        counts = write_scene_questions(fetch_pictures()[0], output, instance(SceneQuestionsConfig, options))
    for part, count in counts.items():
        print(f"{part:<24} {count}")


COMMANDS: dict[tuple[str, ...], Command] = {
    ("data", "validate"): Command(
        "Count records, sizes, broken pictures, empty captions and duplicate ids.",
        "SOURCE [SOURCE ...] [--json] [how to read them]",
        "qformers data validate pairs.jsonl --images pictures/",
        _validate_options,
        _validate,
    ),
    ("data", "features"): Command(
        "Run a recipe's frozen image encoder once and keep its output in the recipe's `data.features`.",
        "RECIPE.yaml [--any.setting value ...]",
        "qformers data features recipes/stage1.yaml --data.features features/",
        recipe_options,
        _features,
    ),
    ("data", "questions"): Command(
        "Make questions about pictures, with answers: easy-VQA, or scenes of several things.",
        "--output DIR [--kind easy_vqa|scenes] [--scenes N] [--things N] [--seed N]",
        "qformers data questions --output data/easy_vqa",
        _questions_options,
        _questions,
    ),
    ("data", "demo"): Command(
        "Make the demo's data set alone, at any size and seed.",
        "--output DIR [--scenes N] [--seed N]",
        "qformers data demo --output demo-data --scenes 5000 --seed 1",
        _data_demo_options,
        _data_demo,
    ),
}
