"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance, recipe_options


def _demo_options(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="A small run of at most 3 minutes.")
    size.add_argument("--long", action="store_true", help="A longer run of at most an hour.")
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
