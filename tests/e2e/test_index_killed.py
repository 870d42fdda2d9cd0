"""Killed with SIGKILL at ten random moments, the indexer loses nothing committed, and the next run completes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from toy_run import toy_config, write_toy_data

import qformers
from qformers.errors import DataError
from qformers.search.indexing import index_folder
from qformers.search.table import open_table, scan
from qformers.training.loop import train

PICTURES, KILLS = 60, 10
CHILD = """
import sys
import torch
from qformers.search import indexing

torch.set_num_threads(1)
indexing.COMMIT_IMAGES = 2
print("ready", flush=True)
indexing.index_folder(*sys.argv[1:])
print("done", flush=True)
"""


def committed(place) -> dict[str, str]:
    """What a reader finds: path and hash of every row, each with whole vectors of unit length."""
    try:
        table, _ = open_table(place)
    except DataError:
        return {}
    rows = scan(table, ["path", "sha256", "vectors"]).to_pylist()
    for row in rows:
        np.testing.assert_allclose(np.linalg.norm(row["vectors"], axis=1), 1, atol=1e-5)
    found = {row["path"]: row["sha256"] for row in rows}
    assert len(found) == len(rows)  # no picture twice
    return found


def test_sigkill_at_ten_random_moments(tmp_path):
    write_toy_data(tmp_path)
    train(toy_config(tmp_path, tmp_path / "run", steps=4, precision="fp32"))
    draw, folder, place = np.random.default_rng(0), tmp_path / "pictures", tmp_path / "index"
    folder.mkdir()
    for number in range(PICTURES):
        Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "run"), str(place)]
    before: dict[str, str] = {}
    moments = []
    for _ in range(KILLS):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            rows = len(before)
            # Some kills fall before the first commit, some into the middle of one.
            goal, wait = rows + random.randint(0, 6), random.uniform(0.0, 0.3)
            deadline = time.monotonic() + 60
            while len(committed(place)) < goal and process.poll() is None:
                assert time.monotonic() < deadline, "the indexer does not get on"
                time.sleep(0.01)
            time.sleep(wait)
            process.kill()
        after = committed(place)
        assert before.items() <= after.items()
        before = after
        moments.append(len(after))
        if len(after) == PICTURES:  # it was faster: there must be something left to do
            changed = Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8))
            changed.save(folder / f"more {len(list(folder.iterdir()))}.png")
    print(f"rows after each kill: {moments}")
    report = index_folder(folder, str(tmp_path / "run"), place)
    everything = {file.name for file in folder.iterdir()}
    assert committed(place).keys() == everything and report.unchanged == len(before)
    fresh = index_folder(folder, str(tmp_path / "run"), tmp_path / "fresh")
    assert fresh.total == report.total
    hits = []
    for made in (place, tmp_path / "fresh"):
        found = qformers.Index.open(made).search("a red square", k=len(everything))
        hits.append({hit.path: hit.score for hit in found})
    assert hits[0] == pytest.approx(hits[1], abs=1e-5)
