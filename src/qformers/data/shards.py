"""Tars and parquet files read where they are, on disk or by URL: an index of each, and random access by it.

Nothing is copied but the index (16 bytes a record of a tar), which is made once and kept with the caches of
`datasets`. A reader keeps some files open; of those at a URL it keeps the blocks read last, so that neighbouring
records cost one request together.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import datasets.config
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int

from qformers.data.archives import BinaryFile, Row, sample_row, sample_spans
from qformers.data.config import SourceConfig
from qformers.data.sampling import Part
from qformers.data.sources import as_list, find_column
from qformers.errors import ConfigError, DataError

OPEN_FILES = 64
ROW_GROUPS = 32  # of parquet files, kept decoded by each process
REMOTE = {"cache_type": "blockcache", "block_size": 4 << 20, "cache_options": {"maxblocks": 4}}
SUFFIXES = (".tar", ".parquet")
# Part of every index's key: raise it when the same file would be indexed differently.
INDEX_VERSION = 1

Value = TypeVar("Value")


@dataclass(frozen=True)
class Shard:
    """One file. `index` has a row for each record of a tar (start, bytes), for each row group of a parquet file
    (first record, records)."""

    path: str
    index: Int[np.ndarray, "rows 2"]

    @property
    def is_tar(self) -> bool:
        return self.path.endswith(".tar")

    def __len__(self) -> int:
        return len(self.index) if self.is_tar else int(self.index[:, 1].sum())


class ShardRecords:
    """Records of a source's shards, in the order of their names, with the columns that `open_source` gives."""

    def __init__(self, config: SourceConfig, shards: list[Shard], filesystem: fsspec.AbstractFileSystem) -> None:
        self.config = config
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards])
        self._filesystem = filesystem
        self._forget()

    @classmethod
    def open(cls, config: SourceConfig) -> ShardRecords:
        """Find the shards of `config.path` and index those that were not indexed before.

        Raises:
            ConfigError: the settings do not go with shards.
            DataError: there are none, one is damaged (named, with the place), or they hold no record.
        """
        if config.split is not None:
            raise ConfigError(f"{config.path}: split is {config.split!r}, but shards that are streamed have no splits")
        try:
            filesystem, place = fsspec.url_to_fs(config.path)
            paths = _shard_paths(filesystem, place)
        except (ImportError, ValueError) as error:
            raise DataError(f"{config.path}: {error}") from error
        except OSError as error:
            raise DataError(f"{config.path}: cannot be listed: {error}") from error
        if not paths:
            raise DataError(f"{config.path}: no shards here; stream reads files ending in {' and '.join(SUFFIXES)}")
        with ThreadPoolExecutor(16) as pool:
            shards = list(pool.map(lambda path: Shard(path, _index(filesystem, path)), paths))
        records = cls(config, [shard for shard in shards if len(shard)], filesystem)
        if len(records) == 0:
            raise DataError(f"{config.path}: no records")
        return records

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def pieces(self) -> Int[np.ndarray, " shards"]:
        """Records of each shard."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, index: int) -> Row:
        """Record `index`. Raises DataError, which begins with its `place`, if its shard is gone or damaged."""
        number, within = self._find(index)
        shard = self.shards[number]
        try:
            return self._of_tar(number, within) if shard.is_tar else self._of_parquet(number, within)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            self._files.pop(number, None)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            raise DataError(f"{self.place(index)}: its shard cannot be read: {reason}") from error

    def place(self, index: int) -> str:
        """Where a record is, for errors that come before its name can be read."""
        number, within = self._find(index)
        return f"{self.shards[number].path} record {within}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}, "_groups": {}}

    def _forget(self) -> None:
        self._files: dict[int, BinaryFile] = {}
        self._groups: dict[tuple[int, int], pyarrow.Table] = {}

    def _find(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - int(self.ends[number - 1] if number else 0)

    def _file(self, number: int) -> BinaryFile:
        return _kept(self._files, number, OPEN_FILES, lambda: _open(self._filesystem, self.shards[number].path))

    def _of_tar(self, number: int, within: int) -> Row:
        shard, file = self.shards[number], self._file(number)
        start, length = (int(value) for value in shard.index[within])
        file.seek(start)
        content = file.read(length)
        if len(content) < length:
            raise ValueError(f"it ends after {start + len(content)} bytes, it had {start + length} when it was indexed")
        name = posixpath.basename(shard.path)
        return sample_row(content, name, self.config.caption_column, self.config.id_column)

    def _of_parquet(self, number: int, within: int) -> Row:
        shard, config = self.shards[number], self.config
        group = int(np.searchsorted(shard.index[:, 0], within, side="right")) - 1

        def read() -> pyarrow.Table:
            return pyarrow.parquet.ParquetFile(self._file(number)).read_row_group(group)

        table = _kept(self._groups, (number, group), ROW_GROUPS, read)
        (record,) = table.slice(within - int(shard.index[group, 0]), 1).to_pylist()
        there, file = list(record), shard.path
        image = record[find_column(there, config.image_column, "image", "image_column", file)]
        captions = record[find_column(there, config.caption_column, "caption", "caption_column", file)]
        name = f"{posixpath.basename(shard.path)} record {within}"
        if isinstance(image, str):
            image = {"path": os.path.join(config.images or os.path.dirname(shard.path), image), "bytes": None}
        elif isinstance(image, bytes):
            image = {"path": name, "bytes": image}
        image_id = record.get(config.id_column)
        return {
            "image": image or {"path": "", "bytes": None},
            "captions": as_list(captions),
            "image_id": name if image_id in (None, "") else str(image_id),
            "name": name,
        }


class RecordList:
    """Records of several sources, one after another: tables in memory-mapped files, or shards.

    `weights` are the sources' shares of every batch; without any they are shuffled as one.
    """

    def __init__(self, sources: Sequence[datasets.Dataset | ShardRecords], weights: Sequence[float] = ()) -> None:
        self.sources = list(sources)
        self.weights = list(weights)
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        """Record `index`. Raises DataError, which begins with its `place`, if its shard is gone or damaged."""
        source, within = self._find(index)
        return source[within]

    def place(self, index: int) -> str:
        """Where a record is."""
        source, within = self._find(index)
        return source.place(within) if isinstance(source, ShardRecords) else f"record {within}"

    def parts(self) -> list[Part]:
        """What is shuffled together: each source if they have weights, else all. Of a table, which can be read in any
        order, every record is a piece."""
        pieces = [source.pieces if isinstance(source, ShardRecords) else None for source in self.sources]
        if self.weights:
            firsts = self.ends - [len(source) for source in self.sources]
            return [
                Part(int(first), len(source), piece, weight)
                for first, source, piece, weight in zip(firsts, self.sources, pieces, self.weights, strict=True)
            ]
        ones = [np.ones(len(source), dtype=np.int64) for source in self.sources]
        whole = [one if piece is None else piece for piece, one in zip(pieces, ones, strict=True)]
        return [Part(0, len(self), np.concatenate(whole))]

    def _find(self, index: int) -> tuple[datasets.Dataset | ShardRecords, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[number], index - int(self.ends[number - 1] if number else 0)


def image_number(image_id: str) -> int:
    """A number for an image id: 64 bits of its hash, so that no table of all ids is needed."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little", signed=True)


def _shard_paths(filesystem: fsspec.AbstractFileSystem, place: str) -> list[str]:
    if "*" in place:
        found = filesystem.glob(place)
    elif filesystem.isdir(place):
        found = filesystem.ls(place, detail=False)
    else:
        found = [place] if filesystem.exists(place) else []
    paths = sorted(str(path) for path in found if str(path).endswith(SUFFIXES))
    if len({posixpath.splitext(path)[1] for path in paths}) > 1:
        raise DataError(f"{place}: holds tars and parquet files; name those meant, as in {place.rstrip('/')}/*.tar")
    return paths


def _open(filesystem: fsspec.AbstractFileSystem, path: str) -> BinaryFile:
    return filesystem.open(path, "rb", **({} if isinstance(filesystem, LocalFileSystem) else REMOTE))


def _index(filesystem: fsspec.AbstractFileSystem, path: str) -> Int[np.ndarray, "rows 2"]:
    """The index of a shard, from the cache if the shard is the same as then."""
    try:
        facts = filesystem.info(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    identity = [facts.get(name) for name in ("size", "mtime", "ETag", "LastModified", "created")]
    key = hashlib.sha256(repr((INDEX_VERSION, filesystem.unstrip_protocol(path), identity)).encode()).hexdigest()
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "qformers_shards" / f"{key[:32]}.npy"
    if kept.exists():
        return np.load(kept)
    if facts.get("size") == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    with _open(filesystem, path) as file:
        index = sample_spans(file, path) if path.endswith(".tar") else _row_groups(file, path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as whole:
        np.save(whole, index)
    partial.replace(kept)
    return index


def _row_groups(file: BinaryFile, path: str) -> Int[np.ndarray, "groups 2"]:
    try:
        facts = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    counts = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    firsts = np.cumsum([0, *counts])[: len(counts)]
    return np.stack([firsts, np.array(counts, dtype=np.int64)], axis=1)


def _kept(cache: dict[Any, Value], key: Any, most: int, make: Callable[[], Value]) -> Value:
    """The value of `key`, which is then the newest of at most `most` that are kept."""
    value = cache.pop(key) if key in cache else make()
    cache[key] = value
    if len(cache) > most:
        oldest = cache.pop(next(iter(cache)))
        if hasattr(oldest, "close"):
            oldest.close()  # pyright: ignore[reportAttributeAccessIssue]
    return value
