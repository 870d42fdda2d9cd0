"""A source → its distinct pictures with all their web captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from qformers.data.batch import BrokenImage
from qformers.data.config import SourceConfig
from qformers.data.images import load_image
from qformers.data.sources import open_source, picture_of
from qformers.errors import DataError


@dataclass(frozen=True)
class Picture:
    """One picture of a source. `place` is its number among the distinct ones, `web` all captions of its records."""

    place: int
    name: str
    image_id: str
    path: str  # empty where the picture is inside the source's own files
    web: tuple[str, ...]


class Pictures:
    """The distinct pictures of a source in order of appearance. Records that share an image id are one picture.

    Raises as `open_source`.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.records: datasets.Dataset = open_source(source)
        ids = self.records.select_columns("image_id").with_format("arrow")[:]["image_id"]
        numbers = ids.dictionary_encode().combine_chunks().indices.to_numpy().astype(np.int64)
        # Records by picture, those of one picture in their order.
        self._order = np.argsort(numbers, kind="stable")
        self._starts = np.flatnonzero(np.diff(numbers[self._order], prepend=-1))

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, place: int) -> tuple[Picture, Image.Image | BrokenImage]:
        """A picture's facts, and the picture itself, decoded, or why it cannot be."""
        first, *others = self._rows(place)
        record = self.records[first]
        name, stored = record["name"], picture_of(record)
        web = list(record["captions"])
        if others:
            web += [
                caption
                for captions in self.records.select_columns("captions")[others]["captions"]
                for caption in captions
            ]
        facts = Picture(place, name, record["image_id"], stored if isinstance(stored, str) else "", tuple(web))
        try:
            return facts, load_image(stored, name)
        except DataError as error:
            return facts, BrokenImage(name, str(error).removeprefix(f"{name}: "))

    def content(self, place: int) -> tuple[str, bytes]:
        """A picture's suffix (".jpg") and the bytes of its file.

        Raises:
            DataError: the file is gone.
        """
        record = self.records[self._rows(place)[0]]
        stored = picture_of(record)
        suffix = Path(record["image"].get("path") or record["name"]).suffix.lower()
        try:
            return suffix, Path(stored).read_bytes() if isinstance(stored, str) else stored
        except OSError as error:
            raise DataError(f"{stored}: {error.strerror}: it was there when it was captioned") from error

    def _rows(self, place: int) -> list[int]:
        stop = self._starts[place + 1] if place + 1 < len(self._starts) else len(self._order)
        return self._order[self._starts[place] : stop].tolist()
