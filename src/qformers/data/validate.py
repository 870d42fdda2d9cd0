"""What is in a source, and what is wrong with it, before a run finds out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qformers.data.batch import BrokenImage
from qformers.data.images import decode_image, load_image
from qformers.data.sources import SourceConfig, open_source, picture_of
from qformers.data.text import CaptionTokenizer, clean_caption
from qformers.errors import DataError

_SHOWN = 10


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: float
    middle: float
    max: float


@dataclass(frozen=True)
class Report:
    """What `validate_source` found. Sizes are of the decoded files, before rotation or resizing."""

    records: int
    images: int  # distinct image ids
    captions: int
    captions_per_image: Spread  # middle = mean
    width_px: Spread | None  # middle = median; None if no picture could be decoded
    height_px: Spread | None
    formats: dict[str, int]
    modes: dict[str, int]
    broken: list[BrokenImage]
    empty_captions: list[str]  # names of the records with a caption that is empty after cleaning, or with none
    duplicate_ids: int  # image ids on more than one record
    clashing_ids: list[str]  # image ids that stand for different pictures
    duplicate_captions: int  # captions that repeat an earlier one
    too_long_captions: int | None  # over the token limit; None without a tokenizer

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts and numbers."""
        return asdict(self)

    def table(self) -> Table:
        """The report for a terminal."""
        table = Table("what", "found", title="data validation", title_justify="left")
        rows: list[tuple[str, object]] = [
            ("records", self.records),
            ("images", self.images),
            ("captions", self.captions),
            ("captions per image (min / mean / max)", _numbers(self.captions_per_image)),
            ("width in pixels (min / median / max)", _numbers(self.width_px)),
            ("height in pixels (min / median / max)", _numbers(self.height_px)),
            ("formats", _counts(self.formats)),
            ("modes", _counts(self.modes)),
            ("broken images", _listed([f"{image.name}: {image.reason}" for image in self.broken])),
            ("records with an empty caption", _listed(self.empty_captions)),
            ("image ids on several records", self.duplicate_ids),
            ("image ids of different pictures", _listed(self.clashing_ids)),
            ("repeated captions", self.duplicate_captions),
        ]
        if self.too_long_captions is not None:
            rows.append(("captions over the token limit", self.too_long_captions))
        for what, found in rows:
            table.add_row(what, Text(str(found)))  # plain: a file may be called [red].png
        return table


def validate_source(
    config: SourceConfig, tokenizer: CaptionTokenizer | None = None, workers: int | None = None
) -> Report:
    """Open a source, decode every picture (in `workers` threads, default one per core), read every caption.

    Progress goes to stderr. Raises DataError only where `open_source` does: what is wrong with single
    pictures and captions is in the report.
    """
    records = open_source(config)
    words = records.select_columns(["captions", "image_id", "name"]).to_list()
    captions = [[clean_caption(caption) for caption in row["captions"]] for row in words]
    flat = [caption for of_record in captions for caption in of_record if caption]
    pictures_of: dict[str, set[str]] = {}
    captions_of: Counter[str] = Counter()
    for row, of_record in zip(words, captions, strict=True):
        pictures_of.setdefault(row["image_id"], set()).add(row["name"])
        captions_of[row["image_id"]] += sum(map(bool, of_record))
    records_of = Counter(row["image_id"] for row in words)

    looked_at = _look_at_pictures(records, [row["name"] for row in words], workers or os.cpu_count() or 1)
    whole = [seen for seen in looked_at if not isinstance(seen, BrokenImage)]
    return Report(
        records=len(records),
        images=len(records_of),
        captions=len(flat),
        captions_per_image=_spread(list(captions_of.values()), mean),
        width_px=_spread([seen.width for seen in whole], median) if whole else None,
        height_px=_spread([seen.height for seen in whole], median) if whole else None,
        formats=dict(Counter(seen.format for seen in whole).most_common()),
        modes=dict(Counter(seen.mode for seen in whole).most_common()),
        broken=[seen for seen in looked_at if isinstance(seen, BrokenImage)],
        empty_captions=[row["name"] for row, each in zip(words, captions, strict=True) if not each or not all(each)],
        duplicate_ids=sum(count > 1 for count in records_of.values()),
        clashing_ids=[image_id for image_id, names in pictures_of.items() if len(names) > 1],
        duplicate_captions=len(flat) - len(set(flat)),
        too_long_captions=sum(map(tokenizer.is_too_long, flat)) if tokenizer else None,
    )


@dataclass(frozen=True)
class _Picture:
    width: int
    height: int
    format: str
    mode: str


def _look_at_pictures(records: datasets.Dataset, names: list[str], workers: int) -> list[_Picture | BrokenImage]:
    """Every picture decoded once, however many records share it."""
    first_of_name = {name: index for index, name in reversed(list(enumerate(names)))}
    indices = sorted(first_of_name.values())
    pictures = records.select_columns(["image", "name"])

    def look(index: int) -> _Picture | BrokenImage:
        row = pictures[index]
        name = row["name"]
        try:
            image = decode_image(picture_of(row), name)
            seen = _Picture(image.width, image.height, image.format or "unknown", image.mode)
            load_image(image, name)
        except DataError as error:
            return BrokenImage(name, str(error).removeprefix(f"{name}: "))
        return seen

    terminal = Console(stderr=True)
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        return list(progress.track(pool.map(look, indices), total=len(indices)))


def _spread(values: Sequence[float], middle: Any) -> Spread:
    return Spread(min(values), float(middle(values)), max(values))


def _numbers(spread: Spread | None) -> str:
    return "none" if spread is None else f"{spread.min:g} / {spread.middle:.4g} / {spread.max:g}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _listed(names: list[str]) -> str:
    """The number, then the first few by name."""
    more = [f"… {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join([str(len(names)), *names[:_SHOWN], *more])
