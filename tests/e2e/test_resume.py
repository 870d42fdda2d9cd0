"""Killed at random moments and resumed, a run ends as one that was never killed, bit for bit, every record counted."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy_run import metric_rows, toy_config, write_tars, write_toy_data

from qformers.data.config import SourceConfig
from qformers.training.loop import train

RECORDS, BATCH = 16, 4
SETTINGS = {"checkpoint_every_steps": 4, "accumulation_steps": 2, "evaluate_every_steps": 9}
CHILD = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from test_resume import streamed
from qformers.training import loop
from qformers.training.logging import RunLog

torch.set_num_threads(1)
data, output, settings, stop_at = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]), int(sys.argv[4])
original, write = loop.training_batches, RunLog.write

def recorded(config, dataset, first_step, accelerator):
    first = (first_step - 1) * config.accumulation_steps
    for number, batch in enumerate(original(config, dataset, first_step, accelerator), start=first):
        with open(output.with_suffix(".seen"), "a") as file:
            file.write(json.dumps([number, accelerator.process_index, batch.names]) + "\\n")
        yield batch

def write_then_stop(self, step, values):
    write(self, step, values)
    if step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)

loop.training_batches, RunLog.write = recorded, write_then_stop
try:
    loop.train(streamed(data, output, **settings), resume="auto")
except loop.TrainingStoppedError as error:
    print(error)
"""
PATIENCE_SECONDS = 180
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    "OMP_NUM_THREADS": "1",
}


def streamed(data, output, **settings):
    """A run on tars that are read where they are."""
    config = toy_config(data, output, **settings)
    source = SourceConfig(path=str(data / "tars" / "*.tar"), stream=True)
    return replace(config, data=replace(config.data, train=[source], batch_size=BATCH, shuffle_buffer=3))


def write_data(folder):
    write_toy_data(folder)
    write_tars(folder / "tars", RECORDS, shards=4)


def run_and_kill(data, output, settings, rows, in_a_save):
    """SIGKILL once the run has written `rows` rows; or after that, in the middle of writing a checkpoint."""
    command = [sys.executable, "-c", CHILD, data, output, repr(settings), "0"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    metrics, checkpoints = output / "metrics.jsonl", output / "checkpoints"
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)
        while in_a_save and process.poll() is None and not any(checkpoints.glob(".unfinished_*")):
            pass
        process.kill()


def batches_seen(output):
    """The names of each batch by its number and process; a batch that was repeated was the same one."""
    seen: dict[tuple[int, int], list[str]] = {}
    for line in output.with_suffix(".seen").read_text().splitlines():
        if line.endswith("]"):  # a killed run may leave half a line
            number, rank, names = json.loads(line)
            assert seen.setdefault((number, rank), names) == names
    return seen


def assert_every_record_once_an_epoch(seen):
    """`seen` are the names of each batch, in order."""
    per_epoch = RECORDS // len(seen[0])
    for first in range(0, len(seen) - per_epoch + 1, per_epoch):
        names = Counter(itertools.chain(*seen[first : first + per_epoch]))
        assert len(names) == RECORDS and set(names.values()) == {1}, f"epoch {first // per_epoch}: {names}"


def kill_and_compare(folder, steps, kills):
    """Kill one run `kills` times, every second time in a save, and compare its end with that of an undisturbed one."""
    write_data(folder)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    settings = {**SETTINGS, "steps": steps}
    train(streamed(folder, undisturbed, **settings))
    moments = sorted(random.sample(range(2, steps - 6), kills))
    print(f"killed after rows {moments}, every second time in the next save")
    for number, rows in enumerate(moments):
        run_and_kill(folder, killed, settings, rows, in_a_save=number % 2 == 1)
        assert not (killed / "model").exists()
    command = [sys.executable, "-c", CHILD, folder, killed, repr(settings), "0"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    for name in ("model.safetensors", "optimiser.safetensors"):
        expected, found = (load_file(run / "checkpoints" / f"step_{steps:08d}" / name) for run in (undisturbed, killed))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
    expected, found = metric_rows(undisturbed), metric_rows(killed)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    assert [row["loss/total"] for row in found] == [row["loss/total"] for row in expected]
    seen = batches_seen(killed)
    assert sorted(seen) == [(number, 0) for number in range(2 * steps)]
    assert_every_record_once_an_epoch([seen[key] for key in sorted(seen)])


def test_a_killed_and_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    kill_and_compare(tmp_path, steps=24, kills=2)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_for_bit_the_same(tmp_path):
    kill_and_compare(tmp_path, steps=150, kills=20)


@pytest.mark.slow
def test_two_processes_then_one_then_four_see_every_record_once_an_epoch(tmp_path):
    write_data(tmp_path)
    output, steps = tmp_path / "run", 23
    (tmp_path / "child.py").write_text(CHILD)
    for processes, stop_at in ((2, 7), (1, 14), (4, 0)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments = [tmp_path / "child.py", tmp_path, output, repr({"steps": steps}), str(stop_at)]
        child = subprocess.run([sys.executable, *launcher, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        assert f"{processes} process(es)" in (output / "train.log").read_text()
    seen = batches_seen(output)
    whole: dict[int, list[str]] = {}
    for number, rank in sorted(seen):
        whole.setdefault(number, []).extend(seen[number, rank])
    by_processes = [(range(7), 2), (range(7, 14), 1), (range(14, steps), 4)]
    for numbers, processes in by_processes:
        for number in numbers:
            assert sum(key[0] == number for key in seen) == processes
    assert sorted(whole) == list(range(steps)) and all(len(names) == BATCH for names in whole.values())
    assert_every_record_once_an_epoch([whole[number] for number in range(steps)])
    assert [row["step"] for row in metric_rows(output)] == list(range(1, steps + 1))
