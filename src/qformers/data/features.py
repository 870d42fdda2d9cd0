"""A store of precomputed frozen image features on disk, so that training never runs the image encoder.

A store is a folder of two files:

- `features.bf16`: raw little-endian bfloat16, rows of `patches x dim`, one row per record and view: record 0
  view 0, record 0 view 1, …, record 1 view 0, … in the order of the records. View 0 is the evaluation
  transform, the others are random training crops. The row of an undecodable picture is all NaN.
- `store.json`: what the features were made from (`FeatureKey`), the shape, how many rows are durably
  written, and whether that is all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qformers.errors import DataError

FORMAT = 1
FLUSH_SECONDS = 10.0
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
    """Frozen features of a data set, read from disk without copying. Make one with `open` or `create`.

    It can be pickled: a DataLoader worker maps the file anew on its first read.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header = header
        self._rows: Tensor | None = None

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
    def rows(self) -> int:
        """Rows of the complete store: one per record and view."""
        return self.records * self.views

    @property
    def rows_written(self) -> int:
        """Rows that survive a kill: a writer goes on from here."""
        return self.header["rows_written"]

    @property
    def complete(self) -> bool:
        return self.header["complete"]

    def __len__(self) -> int:
        return self.records

    @property
    def _data_file(self) -> Path:
        return self.folder / "features.bf16"

    @property
    def _row_bytes(self) -> int:
        return self.patches * self.dim * 2

    @classmethod
    def open(cls, folder: str | Path, expected_key: FeatureKey) -> FeatureStore:
        """The complete store in `folder`; DataError if it is missing, stale, incomplete or truncated."""
        folder = Path(folder)
        store = cls(folder, _read_header(folder))
        difference = _first_difference(store.header["key"], expected_key.flat())
        if difference:
            raise DataError(f"{folder}: the features are stale, {difference}: {FIX}")
        if not store.complete:
            raise DataError(
                f"{folder}: only {store.rows_written} of {store.rows} rows are written "
                f"({store.records} records x {store.views} views): {FIX}, it goes on where it stopped"
            )
        store._check_size()
        return store

    def read(self, index: int, view: int = 0) -> Float[Tensor, "patches dim"]:
        """Features of record `index` in bfloat16: a view of the mapped file, so nothing is copied.

        Raises DataError when the record's picture could not be decoded while the store was written.
        """
        if not (0 <= index < self.records and 0 <= view < self.views):
            raise DataError(
                f"{self.folder}: record {index}, view {view} asked of a store with {self.records} records "
                f"and {self.views} views"
            )
        if self._rows is None:
            size = self.rows * self.patches * self.dim
            # Private mapping: writing into the tensor copies the page and never reaches the file.
            mapped = torch.from_file(str(self._data_file), shared=False, size=size, dtype=torch.bfloat16)
            self._rows = mapped.view(self.records, self.views, self.patches, self.dim)
        row = self._rows[index, view]
        if torch.isnan(row[0, 0]):
            raise DataError(f"{self.folder}: record {index} had a broken picture when its features were made")
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}

    @classmethod
    def create(cls, folder: str | Path, key: FeatureKey, records: int, patches: int, dim: int) -> FeatureStore:
        """A store to append to. One with the same key goes on where it stopped, any other is replaced.

        DataError if what is left to write does not fit on the disk.
        """
        folder = Path(folder)
        wanted = {
            "format": FORMAT,
            "key": key.flat(),
            "records": records,
            "patches": patches,
            "dim": dim,
            "dtype": "bfloat16",
        }
        store = cls(folder, {**wanted, "rows_written": 0, "complete": False})
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "store.json").exists():
            header = _read_header(folder)
            if all(header.get(name) == value for name, value in wanted.items()):
                store.header = header
                store._check_size()
        if store.complete:
            return store
        if not store.rows_written:
            # A new file, not the old one emptied: a run that still reads the old store keeps its rows.
            store._data_file.unlink(missing_ok=True)
            store._data_file.touch()
        else:
            os.truncate(store._data_file, store.rows_written * store._row_bytes)
        needed = (store.rows - store.rows_written) * store._row_bytes
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(
                f"{folder}: the features need {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free "
                f"({records} records x {key.views} views x {patches} patches x {dim}): use fewer views "
                "or another disk"
            )
        store._write_header()
        return store

    def append(self, features: Float[Tensor, "rows patches dim"]) -> None:
        """Add the next rows, rounded to bfloat16. They count as written after `flush`."""
        done = self._data_file.stat().st_size // self._row_bytes
        if features.shape[1:] != (self.patches, self.dim) or done + len(features) > self.rows:
            raise DataError(
                f"{self.folder}: {tuple(features.shape)} features for a store of {self.rows} rows of "
                f"{self.patches} patches x {self.dim}, {done} of them written"
            )
        words = features.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        try:
            with open(self._data_file, "ab") as file:
                file.write(words.numpy().data)
        except OSError as error:
            raise DataError(
                f"{self._data_file}: {error.strerror} after {done} of {self.rows} rows: free space, {FIX}"
            ) from error

    def flush(self) -> None:
        """Force the appended rows to disk, then record how many they are; the last one completes it."""
        with open(self._data_file, "rb") as file:
            os.fsync(file.fileno())
            rows = os.fstat(file.fileno()).st_size // self._row_bytes
        self.header = {**self.header, "rows_written": rows, "complete": rows == self.rows}
        self._write_header()

    def _write_header(self) -> None:
        partial = self.folder / "store.json.partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(self.header, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "store.json")

    def _check_size(self) -> None:
        needed = self.rows_written * self._row_bytes
        size = self._data_file.stat().st_size if self._data_file.exists() else 0
        if size < needed:
            raise DataError(
                f"{self._data_file}: truncated, {size} bytes where {self.rows_written} rows need {needed}: "
                f"delete the folder, then {FIX}"
            )


def write_features(
    folder: str | Path,
    key: FeatureKey,
    records: int,
    patches: int,
    dim: int,
    batches: Callable[[int], Iterable[Float[Tensor, "batch 3 height width"]]],
    encode: Callable[[Tensor], Tensor],
) -> FeatureStore:
    """Run `encode` over all pictures into the store at `folder`, going on where a killed run stopped.

    `batches(start)` yields `pixel_values` from row `start` on (row = record x views + view). A picture that
    could not be decoded is a row of NaN pixels: its features are NaN and `FeatureStore.read` refuses it.
    Progress goes to stderr. Raises DataError when `encode` gives values that are not finite, or when
    `batches` ends early.
    """
    store = FeatureStore.create(folder, key, records, patches, dim)
    if store.complete:
        return store
    done, flushed_at = store.rows_written, time.monotonic()
    with _progress() as progress:
        task = progress.add_task("features", total=store.rows, completed=done, rate="")
        first, started_at = done, time.monotonic()
        for pixel_values in batches(done):
            store.append(_encode(pixel_values, encode, done, store))
            done += len(pixel_values)
            now = time.monotonic()
            rate = (done - first) / max(now - started_at, 1e-9)
            progress.update(task, completed=done, rate=f"{rate:.1f} images/s")
            if now - flushed_at > FLUSH_SECONDS:
                store.flush()
                flushed_at = now
    store.flush()
    if not store.complete:
        raise DataError(f"{store.folder}: pictures ended after {done} of {store.rows} rows: {FIX}")
    return store


def _encode(
    pixel_values: Tensor, encode: Callable[[Tensor], Tensor], start: int, store: FeatureStore
) -> Float[Tensor, "batch patches dim"]:
    broken = torch.isnan(pixel_values).flatten(1).any(dim=1)
    with torch.no_grad():
        features = encode(torch.where(broken[:, None, None, None], 0.0, pixel_values)).to("cpu", torch.bfloat16)
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise DataError(
            f"{store.folder}: the encoder's output for record {row // store.views} is not finite: "
            "run the encoder in bfloat16 or float32"
        )
    return torch.where(broken.to("cpu")[:, None, None], torch.nan, features)


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(file=sys.stderr),
    )


def _read_header(folder: Path) -> dict[str, Any]:
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
