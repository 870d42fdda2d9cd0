"""Killed with SIGKILL at random steps and resumed, a run ends as one that was never killed, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file
from toy_run import metric_rows, toy_config, write_toy_data

from qformers.training.loop import train

STEPS = 40
SETTINGS = {"checkpoint_every_steps": 4, "accumulation_steps": 2, "evaluate_every_steps": 9}
CHILD = """
import sys
from pathlib import Path
import torch
from toy_run import toy_config
from qformers.training.loop import train

torch.set_num_threads(1)
data, output, steps, settings = sys.argv[1:]
train(toy_config(Path(data), Path(output), steps=int(steps), **eval(settings)), resume="auto")
"""
PATIENCE_SECONDS = 120


def run_and_kill(data, output, rows):
    """SIGKILL once the run has written `rows` rows; the checkpoint it is on may be half written."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, data, output, str(STEPS), repr(SETTINGS)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    metrics = output / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)
        process.kill()


def test_a_killed_and_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    write_toy_data(tmp_path)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(toy_config(tmp_path, undisturbed, steps=STEPS, **SETTINGS))
    kills = sorted(random.sample(range(2, STEPS - 2), 2))
    print(f"killed after rows {kills}")
    for rows in kills:
        run_and_kill(tmp_path, killed, rows)
        assert not (killed / "model").exists()
    train(toy_config(tmp_path, killed, steps=STEPS, **SETTINGS), resume="auto")
    for name in ("model.safetensors", "optimiser.safetensors"):
        expected, found = (load_file(run / "checkpoints" / f"step_{STEPS:08d}" / name) for run in (undisturbed, killed))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
    expected, found = metric_rows(undisturbed), metric_rows(killed)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["loss/total"] for row in found] == [row["loss/total"] for row in expected]
