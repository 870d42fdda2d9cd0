"""Tars and parquet files read where they are: the same records as by `open_source`, in any order, damage named."""

from __future__ import annotations

import itertools
import json
import pickle
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_run import write_tars

from qformers.data.config import SourceConfig
from qformers.data.sampling import EpochSampler, MixtureSampler, Part
from qformers.data.shards import RecordList, ShardRecords
from qformers.data.sources import open_source
from qformers.errors import ConfigError, DataError
from qformers.training.config import DataConfig


@pytest.fixture(autouse=True)
def cache_in(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def streamed(path, **settings) -> ShardRecords:
    return ShardRecords.open(SourceConfig(str(path), stream=True, **settings))


def test_a_tar_gives_the_records_that_copying_it_gives_in_any_order(tmp_path):
    write_tars(tmp_path, pictures=12, shards=3)
    copied = open_source(SourceConfig(str(tmp_path / "pairs-*.tar"), caption_column="words"))
    records = streamed(tmp_path / "pairs-*.tar", caption_column="words")
    assert len(records) == len(copied) == 12 and records.pieces.tolist() == [4, 4, 4]
    again = pickle.loads(pickle.dumps(records))
    for index in np.random.default_rng(0).permutation(12).tolist():
        assert {key: again[index][key] for key in copied.column_names if key != "json"} == {
            key: copied[index][key] for key in copied.column_names if key != "json"
        }


class Ranges(SimpleHTTPRequestHandler):
    """Python's own file server with the one header that it lacks: a part of a file on request."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        if wanted is None:
            return super().do_GET()
        Ranges.asked.append(self.path)
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *arguments):
        """Not to stderr."""


def test_a_tar_behind_a_url_gives_the_same_records_by_parts_of_the_file(tmp_path):
    write_tars(tmp_path / "served", pictures=6, shards=2)
    expected = streamed(tmp_path / "served" / "*.tar")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        records = streamed(f"http://127.0.0.1:{server.server_port}/pairs-*.tar")
        assert [records[index] for index in (5, 0, 3)] == [expected[index] for index in (5, 0, 3)]
        asked = len(Ranges.asked)
        streamed(f"http://127.0.0.1:{server.server_port}/pairs-*.tar")
        assert len(Ranges.asked) == asked  # the index was kept
        server.shutdown()
    assert asked <= 4  # neighbours come with one request
    fsspec.implementations.http.HTTPFileSystem.clear_instance_cache()


def test_another_filesystem_of_fsspec(tmp_path):
    write_tars(tmp_path, pictures=4, shards=1)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/pairs-0.tar", (tmp_path / "pairs-0.tar").read_bytes())
    records = streamed("memory://bucket/")
    assert [records[n]["captions"] for n in range(4)] == [streamed(tmp_path)[n]["captions"] for n in range(4)]


def test_parquet_by_row_groups(tmp_path):
    rows = [{"image": {"bytes": bytes([n]), "path": None}, "text": f"w{n}", "image_id": n} for n in range(10)]
    pa.parquet.write_table(pa.Table.from_pylist(rows[:7]), tmp_path / "a.parquet", row_group_size=3)
    pa.parquet.write_table(pa.Table.from_pylist(rows[7:]), tmp_path / "b.parquet", row_group_size=2)
    records = streamed(tmp_path)
    assert len(records) == 10 and records.pieces.tolist() == [7, 3]
    for index in (9, 0, 6, 3, 7, 2):
        found = records[index]
        assert (found["image"]["bytes"], found["captions"], found["image_id"]) == (
            bytes([index]),
            [f"w{index}"],
            str(index),
        )
    with pytest.raises(DataError, match=r"a\.parquet: no column 'words'; there are: image, text, image_id"):
        streamed(tmp_path, caption_column="words")[0]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"), [("flip", "damaged or cut off at byte"), ("cut", "unexpected end|cut off")]
)
def test_a_damaged_tar_is_named_with_the_place(tmp_path, stream, damage, words):
    """`tarfile` by itself takes a damaged header for the end of the tar, and the rest would go missing unsaid."""
    write_tars(tmp_path, pictures=6, shards=2)
    path = tmp_path / "pairs-1.tar"
    content = bytearray(path.read_bytes())
    start, length = streamed(tmp_path).shards[1].index[1]
    content[int(start) + 3] ^= 0xFF
    path.write_bytes(content if damage == "flip" else path.read_bytes()[: int(start + length)])
    with pytest.raises(DataError, match=rf"pairs-1\.tar: not a readable tar: .*({words})"):
        streamed(tmp_path) if stream else open_source(SourceConfig(str(tmp_path)))


def test_a_shard_that_is_gone_or_changed_is_named_record_by_record(tmp_path):
    write_tars(tmp_path, pictures=6, shards=3)
    records = streamed(tmp_path)
    (tmp_path / "pairs-1.tar").unlink()
    (tmp_path / "pairs-2.tar").write_bytes(b"\1" * 2000)
    assert records[0]["captions"]
    with pytest.raises(DataError, match=r"pairs-1.tar record 1: its shard cannot be read: No such file"):
        records[3]
    with pytest.raises(DataError, match=r"pairs-2.tar record 0: its shard cannot be read: it (has changed|ends after)"):
        records[4]


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no shards here; stream reads files ending in \.tar and \.parquet"):
        streamed(tmp_path / "none.tar")
    with pytest.raises(ConfigError, match="have no splits"):
        streamed(tmp_path, split="train")
    with pytest.raises(DataError, match="xyz"):
        streamed("xyz://bucket/a.tar")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar: the file is empty"):
        streamed(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="holds tars and parquet files"):
        streamed(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        streamed(tmp_path / "a.parquet")


PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(np.array)


@given(PIECES, st.integers(0, 20), st.integers(1, 12), st.integers(0, 9), st.sampled_from([1, 2, 3, 4]))
def test_any_number_of_processes_sees_every_streamed_record_once_an_epoch(pieces, buffer, batch, start, world):
    length, batch = int(pieces.sum()), batch * world
    if length < batch:
        with pytest.raises(DataError):
            EpochSampler(length, batch, pieces=pieces)
        return
    make = partial(EpochSampler, length, batch, 5, pieces=pieces, buffer=buffer, stop_step=start + 9)
    alone = list(make())
    ranks = [make(start_step=start, rank=rank, world_size=world) for rank in range(world)]
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == alone[start:]
    per_epoch = length // batch
    for epoch, steps in itertools.groupby(enumerate(alone), key=lambda pair: pair[0] // per_epoch):
        seen = [index for _, keys in steps for _, index in keys]
        assert len(seen) == len(set(seen)) and all(0 <= index < length for index in seen), epoch


@given(PIECES, st.integers(1, 30), st.integers(1, 4))
def test_a_record_moves_by_less_than_the_buffer_within_its_stretch(pieces, buffer, lanes):
    part = Part(7, int(pieces.sum()), pieces)
    still, moved = (part.order(np.random.default_rng(1), size, lanes) for size in (0, buffer))
    assert sorted(moved) == sorted(still) == list(range(7, 7 + part.length))
    for lane in range(lanes):
        place = {record: row for row, record in enumerate(still[lane::lanes].tolist())}
        assert all(abs(place[record] - row) < buffer for row, record in enumerate(moved[lane::lanes].tolist()))


def test_a_process_reads_few_shards():
    pieces = np.full(64, 10)
    for rank in range(4):
        steps = EpochSampler(640, 16, pieces=pieces, buffer=10, stop_step=40, rank=rank, world_size=4)
        assert len({index // 10 for keys in steps for _, index in keys}) == 16


@given(st.lists(st.integers(1, 40), min_size=2, max_size=3), st.booleans(), st.data())
def test_weights_decide_the_shares_and_every_source_keeps_its_epochs(lengths, whole_batches, data):
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(lengths), max_size=len(lengths)))
    world = data.draw(st.sampled_from([1, 2, 4]))
    firsts = np.cumsum([0, *lengths])[:-1]
    parts = [
        Part(int(first), length, np.full(length, 1) if first else None, weight)
        for first, length, weight in zip(firsts, lengths, weights, strict=True)
    ]
    batch = 4 * -(-int(np.ceil(sum(weights) / min(weights))) // 4)
    steps = 25
    alone = list(MixtureSampler(parts, batch, 3, stop_step=steps, buffer=5, whole_batches=whole_batches))
    ranks = [MixtureSampler(parts, batch, 3, 10, steps, rank, world, 5, whole_batches) for rank in range(world)]
    assert [list(itertools.chain(*each)) for each in zip(*ranks, strict=True)] == alone[10:]
    for part, weight in zip(parts, weights, strict=True):
        inside = range(part.first, part.first + part.length)
        seen = [(epoch, index) for keys in alone for epoch, index in keys if index in inside]
        turn = batch if whole_batches else 1
        assert len(seen) == pytest.approx(steps * batch * weight / sum(weights), abs=turn)
        assert len(seen) % turn == 0
        counts = Counter(seen)
        assert set(counts.values()) == {1}
        whole_epochs = len(seen) // part.length
        assert all((epoch, index) in counts for epoch in range(whole_epochs) for index in inside)
        if whole_batches:
            assert {sum(index in inside for _, index in keys) for keys in alone} <= {0, batch}


def test_a_weight_below_one_row_of_a_batch_is_refused_unless_sources_take_turns():
    parts = [Part(0, 9, None, 9.0), Part(9, 9, None, 1.0)]
    with pytest.raises(ConfigError, match=r"source 2 has 0\.1 of the weight, 0\.8 rows of a batch of 8"):
        MixtureSampler(parts, 8)
    turns = [keys[0][1] >= 9 for keys in MixtureSampler(parts, 8, stop_step=20, whole_batches=True)]
    assert sum(turns) == 2


def test_sources_without_weights_cannot_take_turns():
    with pytest.raises(ConfigError, match="mix_by is batches: sources take turns by their weights, give each one"):
        DataConfig(train=[SourceConfig("a.jsonl"), SourceConfig("b.jsonl")], mix_by="batches")


def test_tables_and_shards_side_by_side(tmp_path):
    write_tars(tmp_path, pictures=6, shards=2)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"image": f"{n}.png", "caption": "a"}) + "\n" for n in "ab")
    )
    both = RecordList([streamed(tmp_path), open_source(SourceConfig(str(tmp_path / "rows.jsonl")))])
    assert len(both) == 8 and both[7]["name"] == "b.png" and both[0]["name"].startswith("pairs-0.tar/")
    (part,) = both.parts()
    assert part.pieces.tolist() == [3, 3, 1, 1]
    weighted = RecordList(both.sources, [1.0, 3.0]).parts()
    assert [(each.first, each.length, each.weight) for each in weighted] == [(0, 6, 1.0), (6, 2, 3.0)]
