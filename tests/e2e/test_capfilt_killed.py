"""Killed at random moments, whole or a worker of Ray's, and started again: complete, nothing twice, the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from toy_capfilt import clean, files_of, rows_of, write_toy_capfilt

from qformers.capfilt.config import OutputConfig, SamplingConfig, WorkConfig

PICTURES, SHARD = 40, 2
SAMPLING = SamplingConfig(captions=4, max_new_tokens=16, min_new_tokens=15)
PATIENCE_SECONDS = 600


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_toy_capfilt(folder, PICTURES)
    output = OutputConfig(str(folder / "whole"), shard_pictures=SHARD)
    clean(folder, folder / "whole", output=output, sampling=SAMPLING, work=WorkConfig(batch_size=1, threads=1))
    return folder


@pytest.fixture
def start(data):
    """Starts `qformers capfilt` in a process of its own; what still runs at the end of the test is killed."""
    processes = []

    def started(output: Path, engine: str) -> subprocess.Popen:
        processes.append(launch(data, output, engine))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.wait()


def launch(data: Path, output: Path, engine: str) -> subprocess.Popen:
    line = "import sys; from qformers.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["capfilt", str(data / "pairs.jsonl"), "--captioner", str(data / "stage2")]
    arguments += ["--ranker", str(data / "stage1"), "--output", str(output), "--engine", engine]
    arguments += ["--captions", "4", "--max_new_tokens", "16", "--min_new_tokens", "15", "--batch_size", "1"]
    arguments += ["--shard_pictures", str(SHARD), "--threads", "1", "--readers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    with (output.parent / f"{engine}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", line, *arguments], stdout=log, stderr=log, env=environment)


def done(output: Path) -> int:
    return len(list(output.glob("accounts/*.jsonl")))


def wait_for(shards: int, output: Path, process: subprocess.Popen) -> None:
    """Until so many shards are done, or the process has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while done(output) < shards and process.poll() is None:
        assert time.monotonic() < deadline, "it does not get on"
        time.sleep(0.02)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes in which Ray runs the stages."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(child.cmdline()).startswith("ray::MapWorker(Map("):
                found.append(child)
    return found


def check_whole(output: Path, data: Path) -> None:
    assert files_of(output) == files_of(data / "whole")
    for pattern in ("captions-*.jsonl", "accounts/*.jsonl"):
        names = [row["image_id"] for row in rows_of(output, pattern)]
        assert len(names) == len(set(names)) == PICTURES
    assert not list(output.rglob("*.partial"))


def test_the_whole_local_run_killed(start, data, tmp_path):
    output, moments = tmp_path / "output", []
    while len(moments) < 3:
        process = start(output, "local")
        wait_for(done(output) + random.randint(0, 3), output, process)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
        moments.append(done(output))
        for file in output.glob("accounts/*.jsonl"):
            assert file.read_bytes() == (data / "whole" / "accounts" / file.name).read_bytes()
    print(f"shards done at each kill: {moments}")
    assert start(output, "local").wait(PATIENCE_SECONDS) == 0
    check_whole(output, data)


def test_workers_of_ray_killed(start, data, tmp_path):
    output = tmp_path / "output"
    process = start(output, "ray")
    killed = []
    for _ in range(2):
        wait_for(done(output) + random.randint(1, 3), output, process)
        # A stage that has nothing left to do has no worker any more.
        worker = random.choice(workers_of(process))
        killed.append((worker.name(), done(output)))
        worker.kill()
    print(f"killed, with so many shards done: {killed}")
    assert process.wait(PATIENCE_SECONDS) == 0, (tmp_path / "ray.log").read_text()[-2000:]
    check_whole(output, data)


@pytest.mark.slow
def test_the_whole_ray_run_killed(start, data, tmp_path):
    output = tmp_path / "output"
    process = start(output, "ray")
    wait_for(random.randint(1, 8), output, process)
    time.sleep(random.uniform(0, 0.3))
    cluster = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(cluster, timeout=PATIENCE_SECONDS)
    assert not alive  # the cluster that it started goes with it
    print(f"shards done at the kill: {done(output)}")
    assert 0 < done(output) < PICTURES / SHARD
    assert start(output, "ray").wait(PATIENCE_SECONDS) == 0, (tmp_path / "ray.log").read_text()[-2000:]
    check_whole(output, data)
