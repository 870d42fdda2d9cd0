"""The output folder: shards of kept captions, the account of each, and which are done.

    capfilt.json            what was asked for and of which models; another run is refused
    captions-00000.jsonl    (or .tar) pictures with their kept captions, as training reads them
    accounts/00000.jsonl    every picture of the shard and what became of each of its captions
    statistics.json, report.html

A shard is done when its account is there. Both are written beside their place and moved into it, the account last, so a
kill leaves nothing half done, and a shard that is done again gets the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

from qformers.capfilt.candidates import Account
from qformers.data.archives import PICTURE_SUFFIXES
from qformers.data.images import load_image
from qformers.errors import ConfigError, DataError

SETTINGS_FILE = "capfilt.json"
NAMES = ("qformers_version", "captioner", "ranker", "judge")  # for people: the weights' fingerprints are compared
ACCOUNTS = "accounts"

ContentOf = Callable[[int], tuple[str, bytes]]


class Shards:
    """The shards of one run, from `opened`."""

    def __init__(self, folder: Path, count: int, shard_format: Literal["jsonl", "webdataset"]) -> None:
        self.folder = folder
        self.count = count
        self.shard_format = shard_format

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, settings: dict[str, Any], count: int) -> Iterator[Shards]:
        """The output folder, for this process alone while the block runs.

        Raises:
            ConfigError: it holds something else, another run, or another process is at work there.
        """
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file: give a folder as --output")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                _check(folder, settings)
                (folder / ACCOUNTS).mkdir(exist_ok=True)
                for unfinished in folder.rglob("*.partial"):
                    unfinished.unlink()
                yield cls(folder, count, settings["shard_format"])
        except Timeout as error:
            raise ConfigError(f"{folder}: another process is writing to it: wait until it is done") from error

    def pending(self) -> list[int]:
        """Shards that are not done."""
        return [shard for shard in range(self.count) if not self._account_file(shard).exists()]

    def write(self, shard: int, accounts: list[Account], content_of: ContentOf) -> None:
        """Finish a shard: its captions, then its account.

        Raises:
            DataError: it cannot be written, or a picture that goes into a tar is gone.
        """
        try:
            kept = [account for account in accounts if account.kept]
            if kept and self.shard_format == "jsonl":
                rows = ({"image": os.path.abspath(account.path), **_facts(account)} for account in kept)
                _replace(self._captions_file(shard), lambda file: _write_lines(file, rows))
            elif kept:
                _replace(self._captions_file(shard), lambda file: _write_tar(file, kept, content_of))
            rows = (account.as_json() for account in accounts)
            _replace(self._account_file(shard), lambda file: _write_lines(file, rows))
        except OSError as error:
            raise DataError(f"{self.folder}: shard {shard} cannot be written ({error}): free some space") from error

    def accounts(self) -> Iterator[Account]:
        """Of all pictures of the shards that are done, in order."""
        for shard in range(self.count):
            if (file := self._account_file(shard)).exists():
                with file.open(encoding="utf-8") as lines:
                    for line in lines:
                        yield Account.of_json(json.loads(line))

    def _captions_file(self, shard: int) -> Path:
        return self.folder / f"captions-{shard:05d}.{'jsonl' if self.shard_format == 'jsonl' else 'tar'}"

    def _account_file(self, shard: int) -> Path:
        return self.folder / ACCOUNTS / f"{shard:05d}.jsonl"


def _check(folder: Path, settings: dict[str, Any]) -> None:
    """Keep `settings` in the folder, or compare them with those there."""
    file = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        if others := sorted(
            path.name for path in folder.iterdir() if path.name not in (".lock", f"{SETTINGS_FILE}.partial")
        ):
            raise ConfigError(f"{folder}: holds {others[0]} and no captions of this command: give another --output")
        _replace(file, lambda to: to.write((json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()))
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error}): give another --output") from error
    for name, value in settings.items():
        if name not in NAMES and found.get(name) != value:
            raise ConfigError(
                f"{folder}: is the output of another run, whose {name} was {found.get(name)!r} and is now {value!r}: "
                "give another --output"
            )


def _facts(account: Account) -> dict[str, Any]:
    """What a training record says of its captions, best first."""
    kept = account.kept
    return {
        "image_id": account.image_id,
        "captions": [candidate.caption for candidate in kept],
        "scores": [candidate.score for candidate in kept],
        "origins": [candidate.origin for candidate in kept],
    }


def _write_lines(file: IO[bytes], rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _write_tar(file: IO[bytes], accounts: list[Account], content_of: ContentOf) -> None:
    """WebDataset: two members of one name for each picture. Times and owners stay 0: same pictures, same bytes."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for account in accounts:
            suffix, content = content_of(account.place)
            if suffix.lstrip(".") not in PICTURE_SUFFIXES:
                suffix, content = ".png", _as_png(content, account.name)
            facts = json.dumps({"name": account.name, **_facts(account)}, ensure_ascii=False).encode()
            for name, part in ((f"{account.place:09d}{suffix}", content), (f"{account.place:09d}.json", facts)):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))


def _as_png(content: bytes, name: str) -> bytes:
    written = io.BytesIO()
    load_image(content, name).save(written, "PNG")
    return written.getvalue()


def _replace(file: Path, write: Callable[[IO[bytes]], Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as to:
        write(to)
        to.flush()
        os.fsync(to.fileno())
    os.replace(partial, file)
