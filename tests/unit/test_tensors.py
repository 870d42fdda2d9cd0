"""Shards: written and read back, one in memory at a time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from qformers.errors import CheckpointError
from qformers.models.tensors import INDEX_FILE, in_memory, open_tensors, write_shards

MB = 2**20
STREAM = """
import sys
from pathlib import Path
from qformers.models.tensors import open_tensors, write_shards

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

tensors, before = open_tensors(Path(sys.argv[1])), peak()
write_shards(tensors, Path(sys.argv[2]), "copying", shard_bytes=int(sys.argv[3]))
print(peak() - before)
"""


def test_one_file_or_shards_and_their_index(tmp_path):
    state = {"b.weight": torch.randn(300, 4), "a.bias": torch.arange(5), "c": torch.tensor(0.5, dtype=torch.bfloat16)}
    for name, options, files in (
        ("one", {}, {"model.safetensors"}),
        ("indexed", {"always_index": True}, {"model.safetensors", INDEX_FILE}),
        ("many", {"shard_bytes": 100}, {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} | {INDEX_FILE}),
    ):
        (tmp_path / name).mkdir()
        write_shards(in_memory(state), tmp_path / name, "writing", **options)
        assert {file.name for file in (tmp_path / name).iterdir()} == files
        again = open_tensors(tmp_path / name)
        assert again.described.keys() == state.keys()
        for key, tensor in state.items():
            assert again.described[key].shape == tensor.shape and again.described[key].is_meta
            assert again.read(key).dtype == tensor.dtype and torch.equal(again.read(key), tensor)


def test_parts_of_one_tensor_are_written_apart(tmp_path):
    """Queries, keys and values cut out of one matrix share its memory, which the format refuses."""
    whole = torch.randn(6, 4)
    write_shards(in_memory(dict(zip("qkv", whole.chunk(3), strict=True))), tmp_path, "writing")
    again = open_tensors(tmp_path)
    assert torch.equal(torch.cat([again.read(name) for name in "qkv"]), whole)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_memory_holds_one_shard_not_the_checkpoint(tmp_path):
    """16 tensors of 16 MiB in 4 files, copied into shards of 64 MiB."""
    for name in ("source", "copy"):
        (tmp_path / name).mkdir()
    weights = {f"layer.{number}": torch.full((4 * MB,), float(number)) for number in range(16)}
    write_shards(in_memory(weights), tmp_path / "source", "writing", shard_bytes=64 * MB)
    line = [sys.executable, "-c", STREAM, str(tmp_path / "source"), str(tmp_path / "copy"), str(64 * MB)]
    taken = int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    assert taken < 1.3 * 64 * MB + 48 * MB, f"{taken / MB:.0f} MiB for a checkpoint of 256 MiB"
    copy = open_tensors(tmp_path / "copy")
    assert all(torch.equal(copy.read(name), tensor) for name, tensor in weights.items())


def test_an_index_that_is_wrong_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        open_tensors(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks b, which the index says it holds"):
        open_tensors(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": ["x.safetensors"]}))
    with pytest.raises(CheckpointError, match="no index of shards"):
        open_tensors(tmp_path)
    (tmp_path / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="no index of shards"):
        open_tensors(tmp_path)
