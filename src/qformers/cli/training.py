"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance, recipe_options


def _demo_options(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="A small run of a few minutes.")
    size.add_argument("--long", action="store_true", help="A longer run of about an hour.")
    parser.add_argument("--output", type=str, default="runs/demo", help="Folder of the report.")
    parser.add_argument(
        "--language_model",
        type=Literal["smollm2", "t5"],
        default="t5",
        help="What says the captions: a small T5 made from the training captions in the run, or SmolLM2-135M.",
    )
    parser.add_argument(
        "--vqa",
        action="store_true",
        help="Answer easy-VQA's questions too, with SmolLM2, beside three controls: on 2 cores about an hour more.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Decides the split, the scenes and the training.")


def _demo(options: Namespace) -> None:
    from qformers.demo.run import run_demo

    size = "quick" if options.quick else "long" if options.long else "standard"
    run_demo(Path(options.output), size, options.seed, options.language_model, options.vqa)


def _study_options(parser: ArgumentParser) -> None:
    parser.add_argument("output", type=str, help="Folder of study.md, its figures and the runs.")
    parser.add_argument(
        "--size",
        type=Literal["full", "quick", "tiny"],
        default="full",
        help="How long each run is and how much is measured: on 2 cores two hours, half an hour, or (tests) less.",
    )
    parser.add_argument(
        "--questions",
        type=str,
        help="Only these, such as 1,3,7; default: all. 1 ITG, 2 stage 2 without stage 1, 3 the encoder's layer, 4 the "
        "number of queries, 5 reading the question, 6 other bridges, 7 hard negatives and re-ranking, 8 CapFilt.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each arm; a verdict needs 3.")
    parser.add_argument(
        "--language_model",
        type=Literal["smollm2", "t5"],
        default="smollm2",
        help="What says captions (questions 2, 6, 8): SmolLM2-135M, or a small T5 made from the training captions "
        "first, which learns to look in far fewer steps.",
    )


def _study(options: Namespace) -> None:
    from qformers.errors import ConfigError
    from qformers.study.run import run_study

    try:
        questions = None if options.questions is None else [int(number) for number in options.questions.split(",")]
    except ValueError as error:
        raise ConfigError(f"--questions is {options.questions!r}: give numbers such as 1,3,7") from error
    run_study(Path(options.output), options.size, questions, options.seeds, options.language_model)


def _train_options(parser: ArgumentParser) -> None:
    recipe_options(parser)
    parser.add_argument(
        "--resume", type=str, help="auto: go on from the run folder's last checkpoint, if there is one."
    )


def _train(options: Namespace) -> None:
    from qformers.training.config import TrainConfig
    from qformers.training.loop import train

    train(instance(TrainConfig, options), resume=options.resume)


def _plan_options(parser: ArgumentParser) -> None:
    recipe_options(parser)
    parser.add_argument("--gpus", type=int, default=1, help="Processes, one on each.")
    parser.add_argument(
        "--tflops", type=float, default=300.0, help="What one GPU does, sustained: an H100 in bf16 some 300."
    )


def _plan(options: Namespace) -> None:
    from qformers.training.config import TrainConfig
    from qformers.training.plan import plan

    config = instance(TrainConfig, options)
    found = plan(config, options.gpus)
    seconds = found.step_flops / (options.tflops * 1e12)
    lines = {
        "batch on each GPU": f"{found.rows} rows",
        "trained parameters": f"{found.trained_parameters / 1e6:.1f} M, {found.state_bytes / 1e9:.2f} GB with AdamW",
        "frozen parameters": f"{found.frozen_parameters / 1e6:.1f} M, {found.frozen_bytes / 1e9:.2f} GB",
        "kept for backward": f"{found.activation_bytes / 1e9:.2f} GB",
        "memory of a GPU": f"{found.memory_bytes / 1e9:.2f} GB and what kernels use for a moment",
        "one step": f"{found.step_flops / 1e12:.2f} TFLOP, {seconds:.3g} s at {options.tflops:g} TFLOP/s",
        "the run": f"{config.steps} steps, {config.steps * seconds / 3600:.3g} h if loading keeps up",
        "features, if stored": f"{found.feature_bytes_per_view / 1e6:.3f} MB a picture and view",
    }
    for name, value in lines.items():
        print(f"{name:<24} {value}")


COMMANDS: dict[tuple[str, ...], Command] = {
    ("demo",): Command(
        "Train on real pictures, evaluate, and write a report: the whole toolkit in one run.",
        "[--quick | --long] [--output DIR] [--seed N] [--language_model t5|smollm2] [--vqa]",
        "qformers demo --quick --output runs/quick",
        _demo_options,
        _demo,
    ),
    ("study",): Command(
        "Ask the paper's questions again at a small scale: train what is compared, and write a page of verdicts.\n"
        "Stopped or killed, the same command goes on; with more questions or seeds it adds to what is there.",
        "OUTPUT [--size full|quick] [--questions 1,3,7] [--seeds N] [--language_model smollm2|t5]",
        "qformers study runs/study --size quick --questions 1,7",
        _study_options,
        _study,
    ),
    ("plan",): Command(
        "Count what a recipe takes on each GPU: memory, work and time; nothing is built.",
        "RECIPE.yaml --gpus N [--tflops T] [--any.setting value ...]",
        "qformers plan recipes/stage1.yaml --gpus 16",
        _plan_options,
        _plan,
    ),
    ("train",): Command(
        "Train stage 1 or 2 as a recipe says; any setting may follow on the command line.",
        "RECIPE.yaml [--any.setting value ...] [--resume auto] [--print_config]",
        "qformers train recipes/stage1.yaml --optimiser.lr 2e-4 --resume auto",
        _train_options,
        _train,
    ),
}
