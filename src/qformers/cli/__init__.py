"""The `qformers` command: typed options and nothing else.

Every worker is imported by the handler that calls it, so that `--help` answers without torch.
"""

from __future__ import annotations

import logging
import sys
import traceback
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from qformers import __version__
from qformers.cli import capfilt, convert, data, model, search, serving, training
from qformers.cli.command import Command
from qformers.errors import QFormersError

COMMANDS = {
    **training.COMMANDS,
    **model.COMMANDS,
    **search.COMMANDS,
    **serving.COMMANDS,
    **capfilt.COMMANDS,
    **convert.COMMANDS,
    **data.COMMANDS,
}
RECIPE_COMMANDS = {("train",), ("plan",), ("data", "features")}
GROUPS = {
    "evaluate": "Measure a trained model.",
    "data": "Check, prepare and make pictures with captions.",
}


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults from jsonargparse, examples with their line breaks kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("qformers").setLevel(logging.INFO)
    try:
        command, options = _parse([argument for argument in given if argument != "--debug"])
        command.run(options)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, status = _verdict(error)
        print("error:", " ".join(message.split()), file=sys.stderr)
        return status


def _verdict(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ArgumentError):
        return str(error), 2
    if isinstance(error, QFormersError):
        return str(error), 1
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1


def _parse(arguments: list[str]) -> tuple[Command, Namespace]:
    """The command asked for and its options, with every dataclass among them built."""
    path = next((path for path in COMMANDS if tuple(arguments[: len(path)]) == path), ())
    rest = arguments[len(path) :]
    recipe = rest[0] if path in RECIPE_COMMANDS and rest and not rest[0].startswith("-") else None
    if recipe:
        # jsonargparse takes a configuration file only as an option
        arguments = [*path, "--recipe", *rest]
    parser = _build_parser(path)
    try:
        options = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        where = f" (recipe: {recipe})" if recipe else ""
        raise ArgumentError(None, f"{error}{where}; see {' '.join(('qformers', *path))} --help") from error
    for word in path:
        options = options[word]
    return COMMANDS[path], options


def _build_parser(asked: tuple[str, ...]) -> ArgumentParser:
    """The whole command line; of the options, those of the command that is asked for."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _parser(f"Train and evaluate Q-Formers (BLIP-2). Version {__version__}.", "qformers demo --quick")
    parser.prog = "qformers"
    parser.add_argument("--version", action="version", version=f"qformers {__version__}")
    parents: dict[tuple[str, ...], Any] = {}
    parents[()] = parser.add_subcommands(dest="command", title="commands", description="")
    for path, command in COMMANDS.items():
        if path[:-1] not in parents:
            members = _parser(GROUPS[path[0]], command.example)
            parents[()].add_subcommand(path[0], members, help=members.description)
            members.prog = f"qformers {path[0]}"
            parents[path[:-1]] = members.add_subcommands(dest="command", title="commands", description="")
        options = _parser(command.summary, command.example)
        options.usage = f"{' '.join(('qformers', *path))} {command.usage}"
        if path == asked:
            command.add_options(options)
        parents[path[:-1]].add_subcommand(path[-1], options, help=command.summary)
    return parser


def _parser(summary: str, example: str) -> ArgumentParser:
    return ArgumentParser(
        description=summary,
        epilog=f"example:\n  {example}\n\n--debug, anywhere, shows the traceback of an error",
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )
