"""What every subcommand is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace


class Command(NamedTuple):
    """One subcommand: what `--help` says, which options it takes, and what it does."""

    summary: str
    usage: str
    example: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


def recipe_options(parser: ArgumentParser) -> None:
    """Options of a command that takes a recipe first: the file, and every setting of TrainConfig."""
    from qformers.training.config import TrainConfig

    parser.add_argument(
        "--recipe",
        action="config",
        required=True,
        metavar="RECIPE.yaml",
        help="YAML file of the settings below; the first argument is taken for it.",
    )
    parser.add_class_arguments(TrainConfig, None)


def model_option(parser: ArgumentParser) -> None:
    """Which trained model to use."""
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="Run folder, a model saved from one, or a BLIP-2 of Hugging Face's (folder or hub id).",
    )


def source_options(parser: ArgumentParser) -> None:
    """How to read pictures with captions: SourceConfig without what only training reads, and without the path, which
    each command names itself."""
    from qformers.data.config import SourceConfig

    parser.add_class_arguments(SourceConfig, None, skip={"path", "stream", "weight"})


def instance(config: type, options: Namespace, **given: Any) -> Any:
    """A `config` dataclass from the options that were built from its fields, and what is `given` apart; the fields
    that are no options keep their defaults."""
    built = {
        field.name: options[field.name] for field in fields(config) if field.name not in given and field.name in options
    }
    return config(**built, **given)
