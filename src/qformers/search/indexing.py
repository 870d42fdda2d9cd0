"""A folder of pictures → an index of them: only what is new or changed is encoded, batch by batch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import torch
from filelock import FileLock, Timeout
from lancedb.table import Table
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qformers.data.batch import BrokenImage
from qformers.data.images import load_image
from qformers.errors import ConfigError, DataError
from qformers.evaluation.pictures import PICTURES_AT_ONCE
from qformers.predictor import Predictor, load
from qformers.search.table import (
    RESERVED,
    IndexSettings,
    build_approximate,
    create_table,
    drop,
    has_table,
    open_table,
    put,
    scan,
)

COMMIT_IMAGES = (
    8 * PICTURES_AT_ONCE
)  # at full size 8 MB of vectors, 150 MB of pixels: what memory holds, and a kill costs
NAME_COLUMNS = ("path", "file_name", "image")

logger = logging.getLogger(__name__)


@dataclass
class IndexReport:
    """What one run of the indexer did. `broken` were left out, `total` is what the index now holds."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    total: int = 0
    broken: list[BrokenImage] = field(default_factory=list)


@dataclass(frozen=True)
class _Picture:
    """One picture to be written: its row but for the vectors, and its pixels."""

    row: dict[str, Any]
    pixel_values: Tensor


def index_folder(
    folder: str | Path,
    model: str,
    place: str | Path,
    metadata: str | None = None,
    approximate: bool = False,
) -> IndexReport:
    """Bring the index at `place` up to the pictures in `folder` and its sub-folders.

    A picture whose bytes, caption and metadata are as in the index is not encoded again; a changed one is replaced, one
    that is gone is dropped. Batches are committed one by one, so a killed run has lost the last batch at most and the
    next goes on. Memory holds one batch beside the paths and hashes. One indexer at a time, any number of readers.

    Args:
        metadata: JSONL or CSV with a column "path", "file_name" or "image" (from `folder`), optionally "caption", and
            columns of the user's, which searches can filter by.
        approximate: build an approximate vector index too, if there is none yet.

    Raises:
        DataError: no pictures, or a metadata file that cannot be used.
        CheckpointError: no such model.
        ConfigError: the index is of another model or folder, has other columns, or another indexer is at work.
    """
    folder, place = Path(folder), Path(place)
    paths = picture_paths(folder, place)
    records, columns = read_metadata(metadata)
    predictor = load(model, "cuda" if torch.cuda.is_available() else "cpu")
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".lock", timeout=0):
            settings = IndexSettings(
                folder=str(folder.resolve()),
                model=model,
                fingerprint=predictor.fingerprint(),
                num_queries=predictor.model.qformer.num_queries,
                embed_dim=predictor.loaded.stage1().vision_projection.out_features,
            )
            table = _table(place, settings, columns)
            report = _update(table, predictor, folder, paths, records)
            if approximate and not table.list_indices():
                build_approximate(table)
            return report
    except Timeout as error:
        raise ConfigError(f"{place}: another indexer is writing to it: wait until it is done") from error


def picture_paths(folder: Path, place: Path) -> list[str]:
    """Files in `folder` with a suffix of pictures, as the index names them. Raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    suffixes, inside = Image.registered_extensions(), place.resolve()
    files = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    found = sorted(file.relative_to(folder).as_posix() for file in files if inside not in file.resolve().parents)
    if not found:
        raise DataError(f"{folder}: holds no pictures, by the suffixes of its files (.jpg, .png, .webp, …)")
    return found


def read_metadata(file: str | None) -> tuple[dict[str, dict[str, Any]], list[pa.Field]]:
    """Each picture's caption and columns by its path, and the user's columns with their types.

    Raises:
        DataError: it cannot be read, names no pictures, names one twice, or has a column that the index itself has.
    """
    if file is None:
        return {}, []
    try:
        read = pyarrow.csv.read_csv if Path(file).suffix.lower() == ".csv" else pyarrow.json.read_json
        table: pa.Table = read(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as metadata ({' '.join(str(error).split())})") from error
    name = next((column for column in NAME_COLUMNS if column in table.column_names), None)
    if name is None:
        raise DataError(f"{file}: no column {', '.join(NAME_COLUMNS)}; there are: {', '.join(table.column_names)}")
    columns = [column.with_nullable(True) for column in table.schema if column.name not in (name, "caption")]
    if taken := sorted(RESERVED & {column.name for column in columns}):
        raise DataError(f"{file}: the index has columns of its own named {', '.join(taken)}: rename them")
    records: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        path = Path(row.pop(name) or "").as_posix()
        if path in records:
            raise DataError(f"{file}: {path} is there twice: give one row for each picture")
        records[path] = row
    return records, columns


def _table(place: Path, settings: IndexSettings, columns: list[pa.Field]) -> Table:
    if not has_table(place):
        return create_table(place, settings, columns)
    table, made_of = open_table(place)
    made_of.check_model(place, settings.model, settings.fingerprint)
    if made_of.folder != settings.folder:
        raise ConfigError(
            f"{place}: is the index of {made_of.folder}, not of {settings.folder}: give another --index, or what it "
            "holds would be dropped"
        )
    before = {column.name: column.type for column in table.schema if column.name not in RESERVED}
    now = {column.name: column.type for column in columns}
    if before != now:
        raise ConfigError(
            f"{place}: its metadata columns are {_named(before)}, those given now {_named(now)}: give the same "
            "--metadata, or index anew elsewhere"
        )
    return table


def _named(columns: dict[str, pa.DataType]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"


def _update(
    table: Table, predictor: Predictor, folder: Path, paths: list[str], records: dict[str, dict[str, Any]]
) -> IndexReport:
    report = IndexReport()
    if unknown := records.keys() - set(paths):
        logger.warning("%d rows of the metadata name no picture of the folder, such as %s", len(unknown), min(unknown))
    stored = scan(table, ("path", "sha256", "record_sha256")).to_pylist()
    known = {row["path"]: (row["sha256"], row["record_sha256"]) for row in stored}
    gone = sorted(known.keys() - set(paths))
    drop(table, gone)
    report.removed = len(gone)
    batch: list[_Picture] = []
    for picture in _pictures(predictor, folder, paths, records, known, report):
        batch.append(picture)
        if len(batch) == COMMIT_IMAGES:
            _commit(table, predictor, batch)
            batch = []
    if batch:
        _commit(table, predictor, batch)
    # Pictures that were indexed whole and are now broken must not be found any more.
    drop(table, [picture.name for picture in report.broken if picture.name in known])
    table.optimize()  # few large files instead of one a commit; older versions stay for their readers
    report.total = table.count_rows()
    return report


def _pictures(
    predictor: Predictor,
    folder: Path,
    paths: list[str],
    records: dict[str, dict[str, Any]],
    known: dict[str, tuple[str, str]],
    report: IndexReport,
) -> Iterator[_Picture]:
    """The new and the changed pictures; what becomes of each is counted in `report`."""
    for path in track(paths, "indexing", console=Console(stderr=True), transient=True):
        record = records.get(path, {})
        try:
            content = (folder / path).read_bytes()
            changed_at = (folder / path).stat().st_mtime
        except OSError as error:
            report.broken.append(BrokenImage(path, error.strerror or str(error)))
            continue
        said = json.dumps(record, sort_keys=True, default=str).encode()
        hashes = hashlib.sha256(content).hexdigest(), hashlib.sha256(said).hexdigest()
        if known.get(path) == hashes:
            report.unchanged += 1
            continue
        try:
            image = load_image(content, path)
        except DataError as error:
            report.broken.append(BrokenImage(path, str(error).removeprefix(f"{path}: ")))
            continue
        if path in known:
            report.changed += 1
        else:
            report.added += 1
        row = {
            **record,
            "path": path,
            "bytes": len(content),
            "width_px": image.width,
            "height_px": image.height,
            "modified": datetime.fromtimestamp(changed_at, timezone.utc),
            "sha256": hashes[0],
            "record_sha256": hashes[1],
        }
        yield _Picture(row, predictor.preprocess(image)[0])


def _commit(table: Table, predictor: Predictor, batch: list[_Picture]) -> None:
    encoded = predictor.encode_image(torch.stack([picture.pixel_values for picture in batch]))
    put(table, [picture.row for picture in batch], encoded.features.float().cpu().numpy())
