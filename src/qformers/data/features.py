"""A store of precomputed frozen image features on disk, so that training never runs the image encoder.

A store is a folder of

- `store.json`: what the features were made from (`FeatureKey`), the shape, and how many rows a shard has;
- `features-00000.safetensors`, …: shards, each whole or not there. Tensors: `features` (rows patches dim), in bfloat16,
  or in int8 with `scales` (rows patches) in float32; `checksums` (rows), xxh3 of each row's bytes, scales included.

A row is a record and view: record 0 view 0, record 0 view 1, …, record 1 view 0, … in the order of the records. View 0
is the evaluation transform, the others are random training crops. The row of an undecodable picture is all NaN.
`feature_writing.py` makes stores.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float, UInt8
from torch import Tensor

from qformers.errors import DataError

FORMAT = 2
SHARDS_MAPPED = 512  # at a time: the kernel limits how many maps a process has
DTYPES = {"BF16": torch.bfloat16, "I8": torch.int8, "F32": torch.float32, "I64": torch.int64}  # safetensors' names
SAMPLE_BYTES = 64 * 1024
FIX = "run `qformers data features` again"


@dataclass(frozen=True)
class FeatureKey:
    """Everything the features depend on. A store made from anything else is refused."""

    encoder: str  # fingerprint of the image encoder's weights
    layer: int
    image_px: int
    transform: Mapping[str, Any]  # the transform's settings, as `dataclasses.asdict` gives them
    views: int
    records: str  # `records_fingerprint` of the data set
    dtype: str = "bfloat16"  # or int8

    def flat(self) -> dict[str, Any]:
        """The fields as JSON keeps them, the transform's settings as `transform.<name>`."""
        fields = json.loads(json.dumps({**asdict(self), "transform": None}))
        transform = json.loads(json.dumps(dict(self.transform)))
        del fields["transform"]
        return {**fields, **{f"transform.{name}": value for name, value in transform.items()}}


def records_fingerprint(records: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the records' order, names and pictures; a changed, added, removed or moved picture changes it.

    A picture counts with its size and its first and last 64 KiB: the whole file for most, and cheap enough
    to check at the start of every run. Modification times are left out, so a copied data set still fits.
    `records` have a `name` and an `image` of {"path", "bytes"}; a missing file counts as missing.
    """
    digest = hashlib.sha256()
    for record in records:
        size, sample = _sample(record["image"])
        digest.update(json.dumps([record["name"], size]).encode())
        digest.update(sample)
    return digest.hexdigest()


def _sample(image: Mapping[str, Any]) -> tuple[int, bytes]:
    content = image.get("bytes")
    if content is not None:
        return len(content), content[:SAMPLE_BYTES] + content[SAMPLE_BYTES:][-SAMPLE_BYTES:]
    try:
        with open(image["path"], "rb") as file:
            head, size = file.read(SAMPLE_BYTES), os.fstat(file.fileno()).st_size
            file.seek(max(len(head), size - SAMPLE_BYTES))
            return size, head + file.read(SAMPLE_BYTES)
    except OSError:
        return -1, b""


class FeatureStore:
    """Frozen features of a data set, in mapped files. Make one with `open`, or `create` in `feature_writing.py`.

    It can be pickled: a DataLoader worker maps the files anew.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header = header
        self._shards: dict[int, Shard] = {}

    @property
    def records(self) -> int:
        return self.header["records"]

    @property
    def views(self) -> int:
        return self.header["key"]["views"]

    @property
    def patches(self) -> int:
        return self.header["patches"]

    @property
    def dim(self) -> int:
        return self.header["dim"]

    @property
    def dtype(self) -> str:
        return self.header["key"]["dtype"]

    @property
    def rows(self) -> int:
        """Rows of the complete store: one per record and view."""
        return self.records * self.views

    @property
    def row_bytes(self) -> int:
        """Of one row on the disk."""
        return self.patches * (self.dim * 2 if self.dtype == "bfloat16" else self.dim + 4)

    @property
    def shards(self) -> int:
        """How many files the complete store has."""
        return -(-self.rows // self.header["rows_per_shard"])

    def shard_rows(self, number: int) -> range:
        """The rows of shard `number`."""
        size = self.header["rows_per_shard"]
        return range(number * size, min((number + 1) * size, self.rows))

    def shard_path(self, number: int) -> Path:
        """The file of shard `number`."""
        return self.folder / f"features-{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not there, or too short."""
        return [number for number in range(self.shards) if not self._is_there(number)]

    def __len__(self) -> int:
        return self.records

    @classmethod
    def open(cls, folder: str | Path, expected_key: FeatureKey) -> FeatureStore:
        """The complete store in `folder`; DataError if it is missing, stale, incomplete or truncated."""
        folder = Path(folder)
        store = cls(folder, read_header(folder))
        difference = _first_difference(store.header["key"], expected_key.flat())
        if difference:
            raise DataError(f"{folder}: the features are stale, {difference}: {FIX}")
        if missing := store.missing():
            raise DataError(
                f"{folder}: {len(missing)} of {store.shards} shards are missing or cut off, the first is "
                f"{store.shard_path(missing[0]).name} ({store.records} records x {store.views} views): {FIX}, "
                "it makes those alone"
            )
        return store

    def read(self, index: int, view: int = 0) -> Float[Tensor, "patches dim"]:
        """Features of record `index` in bfloat16: in a bfloat16 store a view of the mapped file, so nothing is copied.

        A row is checked when this process first reads it.

        Raises:
            DataError: the record's picture could not be decoded while the store was written, or the row is not as
                written, or its shard is gone.
        """
        if not (0 <= index < self.records and 0 <= view < self.views):
            raise DataError(
                f"{self.folder}: record {index}, view {view} asked of a store with {self.records} records "
                f"and {self.views} views"
            )
        number, within = divmod(index * self.views + view, self.header["rows_per_shard"])
        shard = self._shard(number)
        row = shard.features[within]
        if shard.scales is not None:
            row = (row * shard.scales[within][:, None]).bfloat16()
        if within not in shard.checked:
            if not shard.is_whole(within):
                raise DataError(
                    f"{self.shard_path(number)}: row {within} (record {index}, view {view}) is not as written: {FIX}, "
                    "it finds and replaces what is damaged"
                )
            if torch.isnan(row[0, 0]):
                raise DataError(f"{self.folder}: record {index} had a broken picture when its features were made")
            shard.checked.add(within)
        return row

    def damaged(self, number: int) -> str | None:
        """What is wrong with shard `number`, every row of it read; None if nothing is."""
        try:
            shard = Shard.map(self.shard_path(number))
            for within in range(len(self.shard_rows(number))):
                if not shard.is_whole(within):
                    return f"row {within} is not as written"
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            return " ".join(str(error).split()) or type(error).__name__
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}

    def _is_there(self, number: int) -> bool:
        path, needed = self.shard_path(number), len(self.shard_rows(number)) * self.row_bytes
        return path.exists() and path.stat().st_size >= needed

    def _shard(self, number: int) -> Shard:
        found = self._shards.get(number)
        if found is None:
            try:
                found = Shard.map(self.shard_path(number))
            except (OSError, RuntimeError, ValueError, LookupError) as error:
                reason = " ".join(str(error).split())
                raise DataError(f"{self.shard_path(number)}: cannot be read: {reason}: {FIX}") from error
            if len(self._shards) >= SHARDS_MAPPED:
                self._shards.pop(next(iter(self._shards)))
            self._shards[number] = found
        return found


@dataclass(frozen=True)
class Shard:
    """One file of a store, mapped.

    `contents` are the bytes of `features` and, if there are any, of `scales`, row by row, as numpy's: it slices in a
    tenth of the time that a tensor takes. `checked` are the rows that were found whole and of a picture: checking
    takes as long as reading.
    """

    features: Tensor
    scales: Tensor | None
    checksums: list[int]
    contents: list[UInt8[np.ndarray, "rows _"]]
    checked: set[int] = field(default_factory=set)

    @classmethod
    def map(cls, path: Path) -> Shard:
        """The shard in `path`. Raises OSError, RuntimeError, ValueError or LookupError where it is none."""
        tensors = _map_tensors(path)
        features, scales = tensors["features"], tensors.get("scales")
        contents = row_bytes([features] if scales is None else [features, scales])
        return cls(features, scales, tensors["checksums"].tolist(), contents)

    def is_whole(self, within: int) -> bool:
        """Whether row `within` is as it was written."""
        return checksum([content[within] for content in self.contents]) == self.checksums[within]


def row_bytes(tensors: list[Tensor]) -> list[UInt8[np.ndarray, "rows _"]]:
    """The bytes of each tensor's rows, for `checksum`."""
    return [tensor.view(torch.uint8).flatten(1).numpy() for tensor in tensors]


def checksum(parts: list[UInt8[np.ndarray, " _"]]) -> int:
    """xxh3 of one row's bytes, as a signed 64-bit number."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part.data)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file as views of the mapped file; safetensors' own reader would copy them.

    The mapping is private: writing into a tensor copies the page and never reaches the file.
    """
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(mapped[:8].numpy().tobytes(), "little")
    described = json.loads(mapped[8:start].numpy().tobytes())
    tensors = {}
    for name, entry in described.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = mapped[first:last].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def read_header(folder: Path) -> dict[str, Any]:
    """What `store.json` says. Raises DataError if there is none, or none of this format."""
    path = folder / "store.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no feature store here (store.json is missing): {FIX}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): delete the folder, then {FIX}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise DataError(f"{path}: store format {found!r}, this version reads {FORMAT}: {FIX}")
    return header


def _first_difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    for name in [*expected, *(name for name in stored if name not in expected)]:
        if stored.get(name) != expected.get(name):
            return f"`{name}` was {stored.get(name)!r} and is now {expected.get(name)!r}"
    return None
