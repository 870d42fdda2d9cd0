from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy_run import small_disk

from qformers.data import feature_writing
from qformers.data.feature_writing import create_store, int8_error, write_shards
from qformers.data.features import FeatureKey, FeatureStore, records_fingerprint
from qformers.errors import DataError

KEY = FeatureKey("abc", -2, 28, {"image_px": 28, "crop_scale": (0.5, 1.0)}, views=2, records="r1")
RECORDS, PATCHES, DIM = 5, 4, 6


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_writing, "SHARD_ROWS", 4)  # three shards: 4, 4 and 2 rows


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(RECORDS * KEY.views, 3, 8, 8, generator=generator)


def encode(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values.flatten(1)[:, : PATCHES * DIM].reshape(-1, PATCHES, DIM) * 2


def write(folder, key=KEY, pixels=None, encoder=encode, rank=0, processes=1):
    pixels = pictures() if pixels is None else pixels
    store = create_store(folder, key, RECORDS, PATCHES, DIM)

    def batches(asked):
        return (pixels[rows.start : rows.stop] for rows in asked if rows.stop <= len(pixels))

    write_shards(store, batches, encoder, rank, processes, batch_size=3)
    return store


def flip_a_byte(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_row_reads_back_as_bfloat16_also_after_pickling(tmp_path, capsys):
    write(tmp_path)
    store = FeatureStore.open(tmp_path, KEY)
    assert (len(store), store.views, store.patches, store.dim) == (RECORDS, KEY.views, PATCHES, DIM)
    expected = encode(pictures()).bfloat16().unflatten(0, (RECORDS, KEY.views))
    for reader in (store, pickle.loads(pickle.dumps(store))):
        for index in range(RECORDS):
            for view in range(KEY.views):
                assert torch.equal(reader.read(index, view), expected[index, view])
    assert store.read(1).data_ptr() - store.read(0).data_ptr() == KEY.views * PATCHES * DIM * 2  # not a copy
    assert len(pickle.dumps(store)) < 2000
    captured = capsys.readouterr()
    assert "10/10" in captured.err and captured.out == ""


def test_safetensors_reads_a_shard_too(tmp_path):
    store = write(tmp_path)
    rows = torch.cat([load_file(store.shard_path(number))["features"] for number in range(store.shards)])
    assert torch.equal(rows, encode(pictures()).bfloat16())


def test_a_reader_cannot_damage_the_file(tmp_path):
    store = write(tmp_path)
    before = store.read(0).clone()
    store.read(0).zero_()
    assert torch.equal(FeatureStore.open(tmp_path, KEY).read(0), before)


def test_rows_outside_the_store_are_refused(tmp_path):
    store = write(tmp_path)
    for index, view in ((RECORDS, 0), (-1, 0), (0, 2)):
        with pytest.raises(DataError, match="5 records and 2 views"):
            store.read(index, view)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_int8_takes_half_the_space_and_its_error_is_known(tmp_path, scale):
    key = replace(KEY, dtype="int8")
    store = write(tmp_path, key, pixels=pictures() * scale)
    expected = encode(pictures() * scale).bfloat16().float()
    found = torch.stack([store.read(index, view) for index in range(RECORDS) for view in range(2)]).float()
    error = ((found - expected).pow(2).sum() / expected.pow(2).sum()).sqrt().item()
    # What is read was rounded to bfloat16 once more: 2^-9 at most.
    assert 0 < int8_error(store) < 0.01 and error == pytest.approx(int8_error(store), abs=2**-9)
    assert store.row_bytes == PATCHES * (DIM + 4)
    with pytest.raises(DataError, match="`dtype` was 'int8' and is now 'bfloat16'"):
        FeatureStore.open(tmp_path, KEY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "xyz"}, "`encoder` was 'abc' and is now 'xyz'"),
        ({"layer": -1}, "`layer` was -2 and is now -1"),
        ({"image_px": 56, "records": "r2"}, "`image_px` was 28 and is now 56"),
        (
            {"transform": {"image_px": 28, "crop_scale": (0.2, 1.0)}},
            r"`transform.crop_scale` was \[0.5, 1.0\]",
        ),
        ({"transform": {"image_px": 28}}, "`transform.crop_scale`"),
        ({"views": 3}, "`views` was 2 and is now 3"),
        ({"records": "r2"}, "`records` was 'r1' and is now 'r2'"),
    ],
)
def test_a_stale_store_is_refused_by_name_and_replaced_by_writing_again(tmp_path, change, words):
    write(tmp_path)
    key = replace(KEY, **change)
    with pytest.raises(DataError, match=words + ".*qformers data features"):
        FeatureStore.open(tmp_path, key)
    store = create_store(tmp_path, key, RECORDS, PATCHES, DIM)
    assert store.missing() == list(range(store.shards))


def test_a_complete_store_is_not_computed_twice(tmp_path):
    write(tmp_path)
    write(tmp_path, encoder=lambda pixels: pytest.fail("encoded again"))


def test_missing_incomplete_truncated_and_older_stores_are_refused(tmp_path):
    with pytest.raises(DataError, match="no feature store"):
        FeatureStore.open(tmp_path, KEY)
    store = write(tmp_path)
    os.truncate(store.shard_path(1), 100)
    with pytest.raises(DataError, match=r"1 of 3 shards are missing or cut off, the first is features-00001"):
        FeatureStore.open(tmp_path, KEY)
    write(tmp_path)
    assert torch.equal(FeatureStore.open(tmp_path, KEY).read(2), encode(pictures()).bfloat16()[4])
    (tmp_path / "store.json").write_text('{"format": 1, "ke')
    with pytest.raises(DataError, match=r"store\.json: cannot be read"):
        FeatureStore.open(tmp_path, KEY)
    (tmp_path / "store.json").write_text('{"format": 1}')
    (tmp_path / "features.bf16").touch()
    with pytest.raises(DataError, match="store format 1, this version reads 2"):
        FeatureStore.open(tmp_path, KEY)
    write(tmp_path)
    assert not (tmp_path / "features.bf16").exists() and FeatureStore.open(tmp_path, KEY).read(0) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_flipped_byte_is_found_when_its_row_is_read_and_mended_by_writing_again(tmp_path, caplog, dtype):
    key = replace(KEY, dtype=dtype)
    store = write(tmp_path, key)
    expected = store.read(1, 1).clone()
    size = store.shard_path(0).stat().st_size
    flip_a_byte(store.shard_path(0), size - 32 - 1 if dtype == "bfloat16" else size - 1)  # 4 checksums at one end
    damaged = FeatureStore.open(tmp_path, key)
    bad = []
    for index, view in [(index, view) for index in range(RECORDS) for view in range(2)] * 2:
        try:
            damaged.read(index, view)
        except DataError as error:
            bad.append(str(error))
    assert "features-00000.safetensors: row" in bad[0] and "is not as written" in bad[0]
    assert bad == [bad[0]] * 2  # the second time too
    write(tmp_path, key)
    assert "features-00000.safetensors: row" in caplog.text and "it is made again" in caplog.text
    assert torch.equal(FeatureStore.open(tmp_path, key).read(1, 1), expected)


def test_a_shard_that_is_gone_is_named(tmp_path):
    store = write(tmp_path)
    store.shard_path(2).unlink()
    assert store.read(0) is not None
    with pytest.raises(DataError, match=r"features-00002\.safetensors: cannot be read: .*No such file"):
        store.read(4)


def test_processes_share_the_shards(tmp_path):
    for rank in (1, 0):
        store = write(tmp_path, rank=rank, processes=2)
        assert store.missing() == ([0, 2] if rank == 1 else [])
    assert torch.equal(store.read(4, 1), encode(pictures()).bfloat16()[-1])


def test_a_writer_killed_between_rows_goes_on(tmp_path):
    """SIGKILL in the second shard: the first is kept, the others are made."""
    script = f"""
        import os, signal, sys
        sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}
        import test_features as t
        t.feature_writing.SHARD_ROWS = 4
        calls = []
        def encode(pixels):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return t.encode(pixels)
        t.write({str(tmp_path)!r}, encoder=encode)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    encoded = []

    def counting(pixels):
        encoded.append(len(pixels))
        return encode(pixels)

    store = write(tmp_path, encoder=counting)
    assert sum(encoded) == 6
    assert torch.equal(store.read(4, 1), encode(pictures()).bfloat16()[-1])


def test_a_broken_picture_is_refused_when_read_and_leaves_the_others_alone(tmp_path):
    pixels = pictures()
    pixels[4] = torch.nan
    for dtype in ("bfloat16", "int8"):
        store = write(tmp_path / dtype, replace(KEY, dtype=dtype), pixels=pixels)
        with pytest.raises(DataError, match="record 2 had a broken picture"):
            store.read(2, 0)
        torch.testing.assert_close(store.read(2, 1), encode(pixels).bfloat16()[5], atol=0.05, rtol=0)


def test_an_encoder_that_overflows_and_pictures_that_end_early_are_errors(tmp_path):
    with pytest.raises(DataError, match="record 0 is not finite"):
        write(tmp_path, encoder=lambda pixels: encode(pixels) / 0)
    with pytest.raises(DataError, match="ended before row 7 of 10"):
        write(tmp_path, pixels=pictures()[:7])
    with pytest.raises(DataError, match=r"\(3, 2, 6\) features for a store of 4 patches x 6"):
        write(tmp_path / "other", encoder=lambda pixels: encode(pixels)[:, :2])


def test_a_full_disk_is_noticed_before_the_first_picture(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(DataError, match=r"need 0\.0 MB, the disk has 0\.0 MB free \(5 records"):
        write(tmp_path, encoder=lambda pixels: pytest.fail("encoded"))


def test_a_disk_that_fills_up_meanwhile_leaves_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_writing, "_check_space", lambda store: None)
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        (disk / "other").write_bytes(bytes((1 << 20) - 8192))  # room for store.json and one shard
        with pytest.raises(DataError, match=r"features-0000[12]\.safetensors: cannot be written: .*free some space"):
            write(disk)
        (disk / "other").unlink()
        assert write(disk).missing() == [] and not list(disk.glob("*.partial"))


def test_changed_pictures_change_the_fingerprint(tmp_path):
    path = tmp_path / "a.png"
    content = bytes(range(256)) * 1000
    path.write_bytes(content)
    in_file = {"name": "a", "image": {"path": str(path), "bytes": None}}
    in_memory = {"name": "b", "image": {"path": "b.png", "bytes": content}}
    first = records_fingerprint([in_file, in_memory])
    os.utime(path, (0, 0))
    assert records_fingerprint([in_file, in_memory]) == first  # a copy with another date is the same data
    assert records_fingerprint([{**in_memory, "name": "a"}, {**in_file, "name": "b"}]) == first
    assert records_fingerprint([in_memory, in_file]) != first
    assert records_fingerprint([in_file]) != first
    for changed in (b"x" + content[1:], content[:-1] + b"x", content + b"x", b""):
        path.write_bytes(changed)
        assert records_fingerprint([in_file, in_memory]) != first
    path.unlink()
    assert records_fingerprint([in_file, in_memory]) != first
