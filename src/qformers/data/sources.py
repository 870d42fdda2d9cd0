"""Every format of pictures with captions → one table of image, captions, image_id, name and more."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError

from qformers.data.archives import archive_rows, coco_rows, karpathy_rows
from qformers.data.config import Format, SourceConfig
from qformers.errors import ConfigError, DataError

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
_GENERATORS = {"coco": coco_rows, "karpathy": karpathy_rows, "webdataset": archive_rows}

# Part of every cache key: raise it when a row would be read differently from the same file.
_CACHE_VERSION = 1

_OTHER_NAMES = {"image": ("file_name",), "caption": ("captions", "text")}


class _Columns(NamedTuple):
    """The names that a table has for what every source gives."""

    image: str
    caption: str
    id: str | None


@dataclass(frozen=True)
class _Located:
    """The files of a source, their format, and the split still to be picked from their rows."""

    format: Format
    files: list[Path]
    split: str | None

    @property
    def stamp(self) -> str:
        """Changes whenever a file does. Part of the cache key: `datasets` by itself goes by times alone."""
        facts = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in self.files]
        return hashlib.sha256(repr((_CACHE_VERSION, facts)).encode()).hexdigest()[:16]


def open_source(config: SourceConfig) -> datasets.Dataset:
    """The records of a source, no picture decoded.

    Columns: `image` {path, bytes} (bytes None where the path is to be opened), `captions` list[str] (empty
    where the file has none), `image_id` str, `name` str (for errors), then the file's other columns. Raises
    DataError for a missing, empty or malformed file, a missing column (naming those there) and an unknown
    layout, ConfigError for a format or split that cannot be.
    """
    if config.annotations or config.image_name:
        raise ConfigError(f"{config.path}: annotations and image_name are of questions: set task to vqa, or neither")
    with quiet():
        source = _locate(config)
        empty = next((path for path in source.files if path.stat().st_size == 0), None)
        if empty is not None:
            raise DataError(f"{empty}: the file is empty (0 bytes)")
        try:
            records = _generate(source, config) if source.format in _GENERATORS else _read_table(source, config)
        except (DatasetGenerationError, pyarrow.ArrowException, ValueError, OSError) as error:
            raise _explained(source, config, error) from error
    if len(records) == 0:
        raise _no_records(config)
    return records


def picture_of(record: Mapping[str, Any]) -> bytes | str:
    """A record's picture as `load_image` takes it; an empty path where the record has none."""
    stored = record["image"] or {}
    content: bytes | None = stored.get("bytes")
    return content if content is not None else stored.get("path") or ""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets`: what went wrong is said by our own errors."""
    verbosity, bars_were_on = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars_were_on:
            datasets.enable_progress_bars()


def _locate(config: SourceConfig) -> _Located:
    if config.format not in get_args(Format):
        raise ConfigError(f"format is {config.format!r}: it must be one of {', '.join(get_args(Format))}")
    path = Path(config.path)
    if path.is_dir():
        return _locate_in_folder(config, path)
    files = [path] if path.exists() else sorted(Path(match) for match in glob.glob(config.path))
    if not files:
        advice = "; a URL can be read with stream: true" if "://" in config.path else ""
        raise DataError(f"{config.path}: no such file or folder{advice}")
    if config.format == "imagefolder":
        raise DataError(f"{path}: format 'imagefolder' needs a folder with {' or '.join(_METADATA_FILES)}")
    if config.format != "auto":
        return _Located(config.format, files, config.split)
    if files[0].suffix.lower() == ".json":
        return _Located(_json_layout(files[0]), files, config.split)
    found = _FORMAT_OF_SUFFIX.get(files[0].suffix.lower())
    if found is None:
        raise DataError(
            f"{files[0]}: no format is known for {files[0].suffix or 'a file without suffix'!r}; set format "
            f"to one of {', '.join(get_args(Format)[1:])}"
        )
    return _Located(found, files, config.split)


def _locate_in_folder(config: SourceConfig, path: Path) -> _Located:
    folder, split = path, config.split
    if split is not None and (path / split).is_dir():
        folder, split = path / split, None
    if config.format in ("auto", "imagefolder"):
        for metadata in (folder / name for name in _METADATA_FILES):
            if metadata.exists():
                return _Located(_FORMAT_OF_SUFFIX[metadata.suffix], [metadata], split)
    for suffix, found in _FORMAT_OF_SUFFIX.items():
        if config.format in ("auto", found) and (files := sorted(folder.glob(f"*{suffix}"))):
            return _Located(found, files, split)
    splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
    advice = f" (sub-folders: {', '.join(splits[:8])}; set split to read one)" if splits else ""
    raise DataError(
        f"{folder}: holds none of {', '.join(_METADATA_FILES)}, nor files ending in "
        f"{', '.join(_FORMAT_OF_SUFFIX)}{advice}"
    )


def _json_layout(path: Path) -> Format:
    """Which of the JSON layouts a file has."""
    if path.stat().st_size == 0:
        return "json"
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        with path.open("rb") as lines:
            if _is_object(next(iter(lines))):
                return "jsonl"
        raise DataError(f"{path}: not JSON: {error}") from error
    if isinstance(content, list) and all(isinstance(row, dict) for row in content[:1]):
        return "json"
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if "annotations" in content:
            return "coco"
        if content["images"] and "sentences" in content["images"][0]:
            return "karpathy"
    keys = f"an object with {', '.join(list(content)[:8])}" if isinstance(content, dict) else "no object"
    raise DataError(
        f"{path}: unknown JSON layout ({keys}); known are a list of records, COCO captions (images, "
        "annotations) and Karpathy splits (images with sentences)"
    )


def _generate(source: _Located, config: SourceConfig) -> datasets.Dataset:
    if source.split is not None and source.format != "karpathy":
        raise ConfigError(f"{config.path}: split is {source.split!r}, but format {source.format} has no splits")
    features = {
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
        "name": datasets.Value("string"),
    }
    if source.format == "webdataset":
        features["json"] = datasets.Json()
    arguments: dict[str, Any] = {"files": [str(path) for path in source.files], "stamp": source.stamp}
    if source.format == "webdataset":
        arguments |= {"caption_column": config.caption_column, "id_column": config.id_column}
    else:
        arguments["images"] = config.images
    if source.format == "karpathy":
        arguments["split"] = source.split
    return datasets.Dataset.from_generator(
        _GENERATORS[source.format], features=datasets.Features(features), gen_kwargs=arguments
    )


def _read_table(source: _Located, config: SourceConfig) -> datasets.Dataset:
    options: dict[str, Any] = {}
    if source.format == "csv":
        tabs = "\t" if source.files[0].suffix.lower() == ".tsv" else ","
        with source.files[0].open(newline="", encoding="utf-8-sig") as lines:
            header = next(csv.reader(lines, delimiter=tabs), [])
        # Everything as text: pandas would read the id "007" as 7 and the caption "None" as missing.
        text = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
        options = {"sep": tabs, "keep_default_na": False, "features": text}
    files = [glob.escape(str(path)) for path in source.files]
    table = datasets.load_dataset(
        _BUILDERS[source.format], name=source.stamp, data_files=files, split="train", **options
    )
    columns = _Columns(
        find_column(table.column_names, config.image_column, "image", "image_column", source.files[0]),
        find_column(table.column_names, config.caption_column, "caption", "caption_column", source.files[0]),
        config.id_column if config.id_column in table.column_names else None,
    )
    if columns.id is None and config.id_column != SourceConfig.id_column:
        raise _missing(table.column_names, config.id_column, "id_column", source.files[0])
    if source.split is not None:
        find_column(table.column_names, "split", "split", "split", source.files[0])
        table = table.filter(lambda value: value == source.split, input_columns="split").flatten_indices()
    return _with_contract_columns(table, columns, config.images or str(source.files[0].parent), config.path)


def find_column(there: list[str], name: str, default: str, setting: str, file: str | Path) -> str:
    """Which of the columns `there` is meant by `name`, whose default goes by other names too. Raises DataError."""
    names = (name, *_OTHER_NAMES.get(default, ())) if name == default else (name,)
    found = next((candidate for candidate in names if candidate in there), None)
    if found is None:
        raise _missing(there, name, setting, file)
    return found


def _missing(there: list[str], name: str, setting: str, file: str | Path) -> DataError:
    return DataError(f"{file}: no column {name!r}; there are: {', '.join(there)}. Set {setting} to the one meant")


def _with_contract_columns(
    table: datasets.Dataset, columns: _Columns, folder: str, source_path: str
) -> datasets.Dataset:
    """The table with image, captions, image_id and name made of its own columns; the others stay."""
    if columns.image != "image":
        others = [name for name in table.column_names if name != "image"]
        table = table.select_columns(others).rename_column(columns.image, "image")
    pictures = None
    if table.features["image"] != datasets.Value("string"):
        pictures = table.select_columns("image").cast_column("image", datasets.Image(decode=False))
        # Only the paths enter the map below: the pictures' bytes are never copied.
        paths = pictures.flatten().select_columns("image.path").rename_column("image.path", "image")
        table = datasets.concatenate_datasets([table.remove_columns("image"), paths], axis=1)
    used = ("image", columns.caption, columns.id)
    features = {name: feature for name, feature in table.features.items() if name not in used}
    features |= {
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
        "name": datasets.Value("string"),
    }
    records = table.map(
        _contract_rows,
        batched=True,
        with_indices=True,
        remove_columns=[name for name in table.column_names if name not in features],
        features=datasets.Features(features),
        fn_kwargs={"columns": columns, "folder": folder, "source_path": source_path},
    )
    if pictures is None:
        return records
    return datasets.concatenate_datasets([pictures, records.remove_columns("image")], axis=1)


def _contract_rows(
    batch: Mapping[str, list],
    indices: list[int],
    columns: _Columns,
    folder: str,
    source_path: str,
) -> dict[str, list]:
    paths = batch["image"]
    names = [path or f"{source_path} record {index}" for path, index in zip(paths, indices, strict=True)]
    ids = batch[columns.id] if columns.id else names
    return {
        "image": [{"path": os.path.join(folder, path) if path else "", "bytes": None} for path in paths],
        "captions": [as_list(value) for value in batch[columns.caption]],
        "image_id": [name if value in (None, "") else str(value) for value, name in zip(ids, names, strict=True)],
        "name": names,
    }


def as_list(value: Any) -> list[str]:
    """The captions of a record, given as none, one or several."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [str(caption) for caption in value if caption is not None]
    return [str(value)]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _no_records(config: SourceConfig) -> DataError:
    return DataError(f"{config.path}: no records" + (f" of split {config.split!r}" if config.split else ""))


def _explained(source: _Located, config: SourceConfig, error: Exception) -> DataError:
    """The one line that says which file, and where the format has lines which line, could not be read."""
    if isinstance(error.__cause__, DataError):
        return error.__cause__
    if "corresponds to no data" in str(error):
        return _no_records(config)
    if source.format == "jsonl":
        for path in source.files:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip() and not _is_object(line):
                        return DataError(f"{path}: line {number} is not a JSON object: {line[:60]!r}")
    reason = " ".join(str(error.__cause__ or error).split())
    return DataError(f"{source.files[0]}: cannot be read as {source.format}: {reason[:300]}")
