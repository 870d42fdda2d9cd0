"""Commands that index pictures and search them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from qformers.cli.command import Command, model_option

INSTALL = "searching needs LanceDB: pip install 'qformers[search]'"


def _index_option(parser: ArgumentParser) -> None:
    parser.add_argument("--index", type=str, required=True, metavar="DIR", help="Folder of the index.")


def _index_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, metavar="FOLDER", help="Pictures, sub-folders included.")
    model_option(parser)
    _index_option(parser)
    parser.add_argument(
        "--metadata",
        type=str,
        metavar="FILE",
        help='JSONL or CSV: "path" from FOLDER, "caption", and columns of yours to filter by.',
    )
    parser.add_argument(
        "--approximate", action="store_true", help="Build an approximate index too: for a hundred thousand pictures."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _index(options: Namespace) -> None:
    _needs_lancedb()
    from qformers.search.indexing import index_folder

    report = index_folder(options.folder, options.model, options.index, options.metadata, options.approximate)
    if options.json:
        print(json.dumps(asdict(report), indent=2, ensure_ascii=False))
        return
    for picture in report.broken:
        print(f"left out: {picture.name}: {picture.reason}", file=sys.stderr)
    for name in ("added", "changed", "removed", "unchanged"):
        print(f"{name:<12} {getattr(report, name)}")
    print(f"{'broken':<12} {len(report.broken)}")
    print(f"{'total':<12} {report.total}")


def _search_options(parser: ArgumentParser) -> None:
    parser.add_argument("text", type=str, nargs="?", metavar="TEXT", help="What to look for.")
    parser.add_argument("--image", type=str, metavar="FILE", help="Look for pictures like this one, or with TEXT.")
    _index_option(parser)
    parser.add_argument("--model", type=str, metavar="M", help="Default: the model that made the index.")
    parser.add_argument("--k", "-k", type=PositiveInt, default=10, help="How many pictures to show.")
    parser.add_argument(
        "--filter", type=str, metavar="SQL", help='Only pictures whose columns are so: "year > 2020 and bytes < 1e6".'
    )
    parser.add_argument(
        "--rerank", type=NonNegativeInt, default=0, metavar="N", help="Re-rank the N best with the ITM head; 0: none."
    )
    parser.add_argument(
        "--rule",
        type=Literal["itm", "itm+itc", "itm+itc/temperature"],
        default="itm+itc",
        help="What re-ranking goes by, as in `evaluate retrieval`.",
    )
    parser.add_argument("--approximate", action="store_true", help="Use the approximate index, if there is one.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--html", type=str, metavar="FILE", help="Write a contact sheet here.")


def _search(options: Namespace) -> None:
    _needs_lancedb()
    from rich.console import Console
    from rich.table import Table

    from qformers.search.index import Index, plain_hit
    from qformers.search.table import Approximation

    index = Index.open(options.index, options.model)
    hits = index.search(
        options.text,
        options.image,
        options.k,
        where=options.filter,
        rerank=options.rerank,
        rule=options.rule,
        approximation=Approximation() if options.approximate else None,
    )
    if options.html:
        from qformers.search.sheet import write_sheet

        write_sheet(options.html, index, hits, " + ".join(filter(None, (options.text, options.image))))
    if options.json:
        print(json.dumps([plain_hit(hit) for hit in hits], indent=2, ensure_ascii=False, default=str))
        return
    table = Table("score", "similarity", "match", "path", "caption", box=None)
    for hit in hits:
        match = "" if hit.match is None else f"{hit.match:.3f}"
        table.add_row(
            f"{hit.score:.4f}", f"{hit.similarity:.4f}", match, hit.path, hit.columns.get("caption") or "", style=None
        )
    Console(markup=False, highlight=False).print(table)


def _export_options(parser: ArgumentParser) -> None:
    _index_option(parser)
    parser.add_argument("--output", type=str, required=True, metavar="PARQUET", help="New file to write.")


def _export(options: Namespace) -> None:
    _needs_lancedb()
    from pathlib import Path

    from qformers.search.table import export, open_table

    export(open_table(Path(options.index))[0], options.output)
    print(options.output)


def _needs_lancedb() -> None:
    from importlib.util import find_spec

    from qformers.errors import ConfigError

    if find_spec("lancedb") is None:
        raise ConfigError(INSTALL)


COMMANDS: dict[tuple[str, ...], Command] = {
    ("index",): Command(
        "Make the pictures of a folder searchable; run again, it takes in what is new, changed or gone.",
        "FOLDER --model M --index DIR [--metadata FILE] [--approximate] [--json]",
        "qformers index pictures/ --model runs/stage1 --index runs/index --metadata about.csv",
        _index_options,
        _index,
    ),
    ("search",): Command(
        "Find pictures by text, by picture or by both.",
        "[TEXT] --index DIR [--image FILE] [-k N] [--filter SQL] [--rerank N] [--approximate] [--json] [--html FILE]",
        'qformers search "a cat on a sofa" --index runs/index -k 20 --rerank 128 --html cats.html',
        _search_options,
        _search,
    ),
    ("export",): Command(
        "Write an index, its vectors included, as parquet for other engines.",
        "--index DIR --output PARQUET",
        "qformers export --index runs/index --output pictures.parquet",
        _export_options,
        _export,
    ),
}
