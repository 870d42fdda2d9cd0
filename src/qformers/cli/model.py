"""Commands that use a trained model."""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from qformers.cli.command import Command, instance, model_option, source_options


def _retrieval_options(parser: ArgumentParser) -> None:
    model_option(parser)
    parser.add_argument("--data", type=str, required=True, help="Pictures with captions, any supported format.")
    source_options(parser)
    parser.add_argument(
        "--rerank",
        type=int,
        default=0,
        metavar="K",
        help="Re-rank the K best by ITC with the ITM head; 0: ITC alone. The paper: 128.",
    )
    parser.add_argument("--json", type=str, metavar="FILE", help="Write the figures here too.")


def _evaluate_retrieval(options: Namespace) -> None:
    from qformers.data.config import SourceConfig
    from qformers.evaluation.run import evaluate_retrieval

    source = instance(SourceConfig, options, path=options.data)
    metrics = evaluate_retrieval(options.model, source, rerank=options.rerank)
    for name, value in metrics.items():
        print(f"{name:<12} {value:.4g}")
    if options.json:
        Path(options.json).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _match_options(parser: ArgumentParser) -> None:
    parser.add_argument("image", type=str, metavar="IMAGE", help="Picture file.")
    parser.add_argument("texts", type=str, nargs="+", metavar="TEXT", help="Each is judged against the picture.")
    model_option(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _match(options: Namespace) -> None:
    from qformers.predictor import load

    model = load(options.model)
    probabilities = model.match([options.image] * len(options.texts), options.texts)
    judged = [{"text": text, "match": float(match)} for text, match in zip(options.texts, probabilities, strict=True)]
    if options.json:
        print(json.dumps(judged, indent=2, ensure_ascii=False))
        return
    for pair in judged:
        print(f"{pair['match']:.3f}  {pair['text']}")


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("image", type=str, metavar="IMAGE", help="Picture file.")
    parser.add_argument("--text", type=str, help="What the queries are to look for; without it they read no text.")
    model_option(parser)
    parser.add_argument("--output", type=str, required=True, metavar="PNG", help="Picture to write.")


def _inspect(options: Namespace) -> None:
    from qformers.evaluation.attention import draw_attention
    from qformers.predictor import load

    maps = load(options.model).attention(options.image, options.text)
    draw_attention(options.image, maps, Path(options.output))
    print(options.output)


COMMANDS: dict[tuple[str, ...], Command] = {
    ("evaluate", "retrieval"): Command(
        "Recall at 1, 5 and 10: the captions of each picture and the picture of each caption.",
        "--model M --data D [--rerank K] [--json FILE] [how to read D]",
        "qformers evaluate retrieval --model runs/stage1 --data test.jsonl --rerank 128 --json recall.json",
        _retrieval_options,
        _evaluate_retrieval,
    ),
    ("match",): Command(
        "The probability that each text describes the picture.",
        "IMAGE TEXT [TEXT ...] --model M [--json]",
        'qformers match cat.jpg "a cat on a sofa" "a red car" --model runs/stage1',
        _match_options,
        _match,
    ),
    ("inspect",): Command(
        "Draw which parts of the picture each query looks at.",
        "IMAGE [--text T] --model M --output PNG",
        'qformers inspect cat.jpg --text "a cat on a sofa" --model runs/stage1 --output attention.png',
        _inspect_options,
        _inspect,
    ),
}
