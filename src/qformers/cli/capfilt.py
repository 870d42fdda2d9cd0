"""The command that cleans captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance, source_options

INSTALL = "the ray engine needs Ray Data: pip install 'qformers[scale]'"


def _options(parser: ArgumentParser) -> None:
    from qformers.capfilt.config import OutputConfig, RankingConfig, SamplingConfig, WorkConfig

    parser.add_argument("source", type=str, metavar="SOURCE", help="Pictures with captions, any supported format.")
    parser.add_argument(
        "--captioner",
        type=str,
        required=True,
        help="Stage-2 run, BLIP-2, or an image-to-text model of Hugging Face's such as BLIP (folder or hub id).",
    )
    parser.add_argument(
        "--ranker",
        type=str,
        required=True,
        help="Stage-1 run (its ITC), or a dual encoder of Hugging Face's such as CLIP or SigLIP (folder or hub id).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    for config in (OutputConfig, SamplingConfig, RankingConfig, WorkConfig):
        parser.add_class_arguments(config, None)
    source_options(parser)


def _capfilt(options: Namespace) -> None:
    from importlib.util import find_spec

    from qformers.capfilt.config import OutputConfig, RankingConfig, SamplingConfig, WorkConfig
    from qformers.data.config import SourceConfig
    from qformers.errors import ConfigError

    if options.engine == "ray" and find_spec("ray") is None:
        raise ConfigError(INSTALL)
    from qformers.capfilt.run import clean_captions

    output = instance(OutputConfig, options)
    found = clean_captions(
        instance(SourceConfig, options, path=options.source),
        options.captioner,
        options.ranker,
        output,
        instance(SamplingConfig, options),
        instance(RankingConfig, options),
        instance(WorkConfig, options),
    )
    for name in found.broken_names:
        print(f"left out: {name}", file=sys.stderr)
    if options.json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    rows: list[tuple[str, Any]] = [("pictures", found.pictures), ("unreadable", found.broken)]
    rows += [("without caption", found.without_caption), ("captions kept", found.kept)]
    for origin, counts in found.captions.items():
        rows += [(f"{origin} {verdict}", count) for verdict, count in counts.items() if count]
    if found.captioner_busy_fraction is not None:
        rows.append(("captioner at work", f"{found.captioner_busy_fraction:.1%}"))
    for name, value in rows:
        print(f"{name:<24} {value}")
    print(Path(output.output) / "report.html")


COMMANDS: dict[tuple[str, ...], Command] = {
    ("capfilt",): Command(
        "Write captions of pictures, rank them with those they came with, and keep the best (CapFilt).",
        "SOURCE --captioner C --ranker R --output DIR [--engine local|ray] [sampling] [ranking] [reading SOURCE]",
        "qformers capfilt web.jsonl --captioner runs/stage2 --ranker runs/stage1 --output runs/cleaned --captions 10",
        _options,
        _capfilt,
    ),
}
