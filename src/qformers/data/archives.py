"""Rows of what `datasets` has no reader for: COCO captions, Karpathy splits, tars of mixed pictures."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from itertools import groupby
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Int

from qformers.errors import DataError

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

Row = dict[str, Any]
BinaryFile = Any  # open for reading: the files of fsspec's filesystems have no type in common

# Each generator takes `stamp` unread: `datasets` keys its cache by a generator's arguments, and the stamp
# is the argument that changes when a file does.


def coco_rows(files: list[str], images: str | None, stamp: str) -> Iterator[Row]:
    """One row per image of COCO captions files ({"images", "annotations"}), with all its captions."""
    for path in files:
        content = _read_json(path)
        folder = images or os.path.dirname(path)
        try:
            captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
            annotations = content["annotations"]
            strays = sum(annotation["image_id"] not in captions for annotation in annotations)
            if strays:
                raise DataError(f"{path}: {strays} of {len(annotations)} annotations belong to no image there")
            for annotation in annotations:
                captions[annotation["image_id"]].append(annotation["caption"])
            for image in content["images"]:
                yield _row(folder, image["file_name"], captions[image["id"]], image["id"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: not COCO captions: {error!r} while reading images and annotations") from error


def karpathy_rows(files: list[str], images: str | None, split: str | None, stamp: str) -> Iterator[Row]:
    """One row per image of Karpathy's split files; "restval" counts as "train", as in every published use."""
    wanted = ("train", "restval") if split == "train" else (split,)
    for path in files:
        content = _read_json(path)
        folder = images or os.path.dirname(path)
        try:
            for image in content["images"]:
                if split is None or image["split"] in wanted:
                    file_name = os.path.join(image.get("filepath", ""), image["filename"])
                    image_id = image.get("cocoid", image.get("imgid", file_name))
                    yield _row(folder, file_name, [sentence["raw"] for sentence in image["sentences"]], image_id)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: not a Karpathy split: {error!r} while reading its images") from error


def archive_rows(files: list[str], caption_column: str, id_column: str, stamp: str) -> Iterator[Row]:
    """One row per sample of WebDataset tars: neighbouring members that share a name up to its first dot.

    The picture may be of another format in each sample. Captions are the text of `.txt` or `.cap`, else
    the `caption_column` (or "captions") of `.json`, which is kept as the column `json`.
    """
    for path in files:
        try:
            with tarfile.open(path) as archive:
                for key, members in _samples(archive):
                    yield _sample_row(archive, os.path.basename(path), key, members, caption_column, id_column)
                _check_end(archive)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise _unreadable(path, error) from error


def sample_spans(file: BinaryFile, path: str) -> Int[np.ndarray, "samples 2"]:
    """Where each sample of an uncompressed tar begins, and its bytes. Reads the headers alone.

    Raises:
        DataError: the tar is damaged or cut off; names the place.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            spans = []
            for _, members in _samples(archive):
                last = members[-1]
                end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                spans.append((members[0].offset, end - members[0].offset))
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _unreadable(path, error) from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def sample_row(content: bytes, shard: str, caption_column: str, id_column: str) -> Row:
    """The one sample in `content`, cut out of the tar `shard` as `sample_spans` says.

    Raises:
        ValueError: there is none, as when the tar has changed since.
    """
    try:
        with tarfile.open(fileobj=BytesIO(content), mode="r:") as archive:
            samples = list(_samples(archive))
            if len(samples) != 1:
                raise ValueError(f"{len(samples)} samples where one was: it has changed since it was indexed")
            return _sample_row(archive, shard, *samples[0], caption_column, id_column)
    except tarfile.TarError as error:
        raise ValueError(f"it has changed since it was indexed: {error}") from error


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    files = (member for member in archive if member.isfile())
    for key, members in groupby(files, key=lambda member: _split_name(member.name)[0]):
        yield key, list(members)


def _check_end(archive: tarfile.TarFile) -> None:
    """`tarfile` takes a damaged header for the end, and so would drop every sample after it without a word."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}, after {len(archive.getmembers())} files")


def _unreadable(path: str, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0].rstrip(":")
    return DataError(f"{path}: not a readable tar: {reason}")


def _split_name(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(folder, stem), suffix.lower()


def _sample_row(
    archive: tarfile.TarFile,
    shard: str,
    key: str,
    members: list[tarfile.TarInfo],
    caption_column: str,
    id_column: str,
) -> Row:
    # extractfile gives None for what is no file, and `members` are files.
    parts = {_split_name(member.name)[1]: cast(IO[bytes], archive.extractfile(member)).read() for member in members}
    suffix = next((suffix for suffix in parts if suffix in PICTURE_SUFFIXES), None)
    name = f"{shard}/{key}" if suffix is None else f"{shard}/{key}.{suffix}"
    try:
        facts = json.loads(parts["json"]) if "json" in parts else {}
        words = next((parts[suffix].decode() for suffix in ("txt", "cap") if suffix in parts), None)
    except ValueError as error:
        raise DataError(f"{name}: its words are not valid text or JSON: {error}") from error
    if not isinstance(facts, dict):
        raise DataError(f"{name}: its .json holds a {type(facts).__name__}, not an object")
    captions = facts.get(caption_column, facts.get("captions", [])) if words is None else words
    return {
        "image": {"path": name, "bytes": parts[suffix]} if suffix else {"path": "", "bytes": None},
        "captions": [captions] if isinstance(captions, str) else list(captions or []),
        "image_id": str(facts.get(id_column, f"{shard}/{key}")),
        "name": name,
        "json": facts,
    }


def _row(folder: str, file_name: str, captions: list[str], image_id: object) -> Row:
    return {
        "image": {"path": os.path.join(folder, file_name), "bytes": None},
        "captions": captions,
        "image_id": str(image_id),
        "name": file_name,
    }


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
