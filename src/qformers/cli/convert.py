"""The command that turns one checkpoint format into another."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance


def _options(parser: ArgumentParser) -> None:
    from qformers.models.config import FrozenParts

    parser.add_argument(
        "source",
        type=str,
        metavar="SOURCE",
        help="Run folder or saved model; folder or hub id of Hugging Face's BLIP-2 or InstructBLIP; .pth of LAVIS.",
    )
    parser.add_argument(
        "destination", type=str, metavar="DESTINATION", help="New folder (lavis: new .pth file) to write."
    )
    parser.add_argument(
        "--to",
        type=Literal["qformers", "hf", "lavis"],
        required=True,
        help="qformers: trains and goes on here; hf: opens in transformers and in servers of its format; lavis: the "
        "authors' code.",
    )
    parser.add_class_arguments(FrozenParts, None)


def _convert(options: Namespace) -> None:
    from qformers.convert.run import convert
    from qformers.models.config import FrozenParts

    convert(options.source, options.destination, options.to, instance(FrozenParts, options))
    print(options.destination)


COMMANDS: dict[tuple[str, ...], Command] = {
    ("convert",): Command(
        "Write a checkpoint in another format, every weight bit for bit, shard by shard.",
        "SOURCE DESTINATION --to qformers|hf|lavis [--vision_encoder V] [--language_model L] [--text_encoder T]",
        "qformers convert blip2_pretrained.pth runs/blip2 --to qformers --vision_encoder Salesforce/blip2-opt-2.7b",
        _options,
        _convert,
    ),
}
