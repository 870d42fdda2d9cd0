"""The command that serves a model."""

from __future__ import annotations

import os

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance

INSTALL = "serving needs FastAPI, Gradio and LanceDB: pip install 'qformers[serve]'"


def _serve_options(parser: ArgumentParser) -> None:
    from qformers.serving.config import ServeConfig

    parser.add_argument(
        "--model",
        type=str,
        nargs="+",
        required=True,
        metavar="M",
        help="One of stage 2, which speaks, or of stage 1, which compares, or one of each.",
    )
    parser.add_argument(
        "--index", type=str, metavar="DIR", help="Index to search; without a stage-1 model, its own compares."
    )
    parser.add_class_arguments(ServeConfig, None)


def _serve(options: Namespace) -> None:
    from importlib.util import find_spec

    from qformers.errors import ConfigError
    from qformers.serving.config import ServeConfig

    token = options.token or os.environ.get("QFORMERS_TOKEN") or None
    config = instance(ServeConfig, options, token=token)
    if any(find_spec(module) is None for module in ("fastapi", "uvicorn", "gradio", "prometheus_client", "lancedb")):
        raise ConfigError(INSTALL)
    from qformers.serving.server import serve

    serve(options.model, options.index, config)


COMMANDS: dict[tuple[str, ...], Command] = {
    ("serve",): Command(
        "Serve a model over HTTP, with a page to try it.",
        "--model M [M2] [--index DIR] [--host H] [--port P] [--token T] [limits]",
        "qformers serve --model runs/stage2 runs/stage1 --index runs/index",
        _serve_options,
        _serve,
    ),
}
