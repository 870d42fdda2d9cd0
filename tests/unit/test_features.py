from __future__ import annotations

import json
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

from qformers.data.features import FeatureKey, FeatureStore, records_fingerprint, write_features
from qformers.errors import DataError

KEY = FeatureKey("abc", -2, 28, {"image_px": 28, "crop_scale": (0.5, 1.0)}, views=2, records="r1")
RECORDS, PATCHES, DIM = 5, 4, 6


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(RECORDS * KEY.views, 3, 8, 8, generator=generator)


def encode(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values.flatten(1)[:, : PATCHES * DIM].reshape(-1, PATCHES, DIM) * 2


def batches_of(pixels: torch.Tensor, size: int = 3):
    return lambda start: iter(pixels[start:].split(size)) if start < len(pixels) else iter(())


def write(folder, key=KEY, pixels=None, encoder=encode):
    pixels = pictures() if pixels is None else pixels
    return write_features(folder, key, RECORDS, PATCHES, DIM, batches_of(pixels), encoder)


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
    assert FeatureStore.create(tmp_path, key, RECORDS, PATCHES, DIM).rows_written == 0


def test_a_complete_store_is_not_computed_twice(tmp_path):
    write(tmp_path)
    write(tmp_path, encoder=lambda pixels: pytest.fail("encoded again"))


def test_missing_incomplete_truncated_and_damaged_stores_are_refused(tmp_path):
    with pytest.raises(DataError, match="no feature store"):
        FeatureStore.open(tmp_path, KEY)
    store = FeatureStore.create(tmp_path, KEY, RECORDS, PATCHES, DIM)
    store.append(encode(pictures()[:4]))
    store.flush()
    with pytest.raises(DataError, match=r"4 of 10 rows .*5 records x 2 views"):
        FeatureStore.open(tmp_path, KEY)
    write(tmp_path)
    os.truncate(tmp_path / "features.bf16", 400)
    with pytest.raises(DataError, match="truncated, 400 bytes where 10 rows need 480"):
        FeatureStore.open(tmp_path, KEY)
    (tmp_path / "store.json").write_text('{"format": 1, "ke')
    with pytest.raises(DataError, match=r"store\.json: cannot be read"):
        FeatureStore.open(tmp_path, KEY)
    (tmp_path / "store.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        FeatureStore.open(tmp_path, KEY)


def test_appended_rows_that_were_not_flushed_are_written_again(tmp_path):
    store = FeatureStore.create(tmp_path, KEY, RECORDS, PATCHES, DIM)
    store.append(encode(pictures()[:4]))
    store.flush()
    store.append(torch.full((3, PATCHES, DIM), 77.0))  # killed here
    with open(tmp_path / "features.bf16", "ab") as file:
        file.write(b"half a row")
    starts = []

    def batches(start):
        starts.append(start)
        return batches_of(pictures())(start)

    store = write_features(tmp_path, KEY, RECORDS, PATCHES, DIM, batches, encode)
    assert starts == [4]
    expected = encode(pictures()).bfloat16()
    assert torch.equal(torch.stack([store.read(i, v) for i in range(5) for v in range(2)]), expected)


def test_a_writer_killed_between_rows_goes_on(tmp_path):
    """SIGKILL while encoding the third batch; what was flushed before is kept and the rest is added."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_features as t
        import qformers.data.features as features
        features.FLUSH_SECONDS = -1.0
        calls = []
        def encode(pixels):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return t.encode(pixels)
        t.write({str(tmp_path)!r}, encoder=encode)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert json.loads((tmp_path / "store.json").read_text())["rows_written"] == 6
    store = write(tmp_path)
    assert torch.equal(store.read(4, 1), encode(pictures()).bfloat16()[-1])


def test_a_broken_picture_is_refused_when_read_and_leaves_the_others_alone(tmp_path):
    pixels = pictures()
    pixels[4] = torch.nan
    store = write(tmp_path, pixels=pixels)
    with pytest.raises(DataError, match="record 2 had a broken picture"):
        store.read(2, 0)
    assert torch.equal(store.read(2, 1), encode(pixels).bfloat16()[5])


def test_an_encoder_that_overflows_and_pictures_that_end_early_are_errors(tmp_path):
    with pytest.raises(DataError, match="record 0 is not finite"):
        write(tmp_path, encoder=lambda pixels: encode(pixels) / 0)
    with pytest.raises(DataError, match="ended after 7 of 10"):
        write(tmp_path, pixels=pictures()[:7])
    with pytest.raises(DataError, match=r"\(4, 4, 6\) features for a store of 10 rows"):
        FeatureStore.create(tmp_path, KEY, RECORDS, PATCHES, DIM).append(torch.zeros(4, PATCHES, DIM))


def test_a_full_disk_is_noticed_before_the_first_picture(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(DataError, match=r"need 0\.0 MB, the disk has 0\.0 MB free \(5 records"):
        write(tmp_path, encoder=lambda pixels: pytest.fail("encoded"))


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
