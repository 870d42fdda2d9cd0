"""What dies under a run: each fault is found, named, and survived or stopped cleanly (docs/reliability.md)."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy_run import metric_rows, small_disk, toy_config, write_tars, write_toy_data

from qformers.data.config import SourceConfig
from qformers.errors import CheckpointError, DataError
from qformers.objectives.config import Stage1LossConfig
from qformers.training import batches
from qformers.training.config import OptimiserConfig
from qformers.training.logging import RunLog
from qformers.training.loop import train

COMMAND = "import sys; from qformers.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_toy_data(folder)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The weights that a run ends with when nothing disturbs it."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    train(toy_config(data, output))
    return last_weights(output)


def last_weights(output):
    return load_file(output / "checkpoints" / "step_00000012" / "model.safetensors")


def assert_same(output, finished):
    for name, weights in last_weights(output).items():
        assert torch.equal(weights, finished[name]), name


def after_step(monkeypatch, step, act):
    """Call `act` once, when the row of `step` is written."""
    write = RunLog.write

    def write_then_act(self, number, values):
        write(self, number, values)
        if number == step:
            act()

    monkeypatch.setattr(RunLog, "write", write_then_act)


def kill_workers():
    for child in multiprocessing.active_children():
        child.kill()


def test_a_killed_loading_worker_is_replaced_and_nothing_is_lost(data, tmp_path, monkeypatch, finished):
    after_step(monkeypatch, 4, kill_workers)
    train(toy_config(data, tmp_path / "run", workers=1))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "a loading worker died (" in log and "others take its place, nothing is lost" in log
    assert_same(tmp_path / "run", finished)


def test_workers_that_die_again_and_again_stop_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "WORKER_DEATHS", 0)
    after_step(monkeypatch, 4, kill_workers)
    with pytest.raises(DataError, match=r"a loading worker died \(.*\), 1 times in this run.*lower data\.workers"):
        train(toy_config(data, tmp_path / "run", workers=1))


def test_a_checkpoint_with_a_flipped_byte_is_named_and_the_one_before_it_goes_on(data, tmp_path, finished):
    config = toy_config(data, tmp_path / "run")
    train(config)
    damaged = tmp_path / "run" / "checkpoints" / "step_00000012" / "optimiser.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    # As many threads as the run that it is compared with.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, "train", tmp_path / "run" / "config.yaml", "--resume", "auto"]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    assert "step_00000012: damaged (optimiser.safetensors not as written): passed over" in child.stderr
    assert "steps 11 to 12" in child.stderr
    assert_same(tmp_path / "run", finished)


def test_a_full_disk_stops_the_run_with_its_last_checkpoint_whole(data, tmp_path, finished):
    """A real file system that fills up."""
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        config = toy_config(data, disk / "run", checkpoint_every_steps=2, keep_checkpoints=99)
        with pytest.raises(CheckpointError, match=r"cannot save .*; the last checkpoint is step_") as stopped:
            train(config)
        assert "No space left on device" in str(stopped.value) or "os error 28" in str(stopped.value)
        kept = sorted((disk / "run" / "checkpoints").iterdir())
        assert kept and all(path.name.startswith("step_") for path in kept)
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        train(config, resume="auto")
        assert_same(disk / "run", finished)


def test_a_temperature_that_runs_up_is_held_and_named(data, tmp_path):
    bounds = Stage1LossConfig(max_temperature=0.0701)
    train(toy_config(data, tmp_path / "run", objectives=bounds, optimiser=OptimiserConfig(lr=0.1, warmup_steps=1)))
    rows = metric_rows(tmp_path / "run")
    assert max(row["temperature"] for row in rows) == pytest.approx(0.0701)
    assert (
        "run up to objectives.max_temperature, 0.0701: lower optimiser.lr"
        in (tmp_path / "run" / "train.log").read_text()
    )


def test_the_best_checkpoint_is_kept_beside_the_last(data, tmp_path, monkeypatch):
    from qformers.training import loop

    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(loop, "validate", lambda *arguments: {"validation/total": next(losses)})
    config = toy_config(data, tmp_path / "run", evaluate_every_steps=3, keep_checkpoints=1)
    train(replace(config, checkpoint_every_steps=4))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000012"]


def test_shards_that_go_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    """One: its records are named and left out. All: the run stops; with the shards back it ends as if nothing was."""
    write_toy_data(tmp_path)
    write_tars(tmp_path / "tars")
    whole = {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    base = toy_config(tmp_path, tmp_path / "undisturbed")
    tars = [SourceConfig(path=str(tmp_path / "tars"), stream=True)]
    base = replace(base, data=replace(base.data, train=tars, max_broken_fraction=0.5))
    train(base)
    one = tmp_path / "tars" / "pairs-2.tar"
    with monkeypatch.context() as patched:
        after_step(patched, 4, lambda: os.truncate(one, 0))
        train(replace(base, output=str(tmp_path / "one")))
    named = (tmp_path / "one" / "broken_images.log").read_text().splitlines()
    assert len(named) == 4 and all(f"{one} record " in line and "its shard cannot be read" in line for line in named)
    config = replace(base, output=str(tmp_path / "all"))
    one.write_bytes(whole[one])
    with monkeypatch.context() as patched:
        after_step(patched, 6, lambda: [os.truncate(path, 0) for path in whole])
        with pytest.raises(
            DataError, match=r"no row of a whole batch can be used: .*\.tar record \d: its shard cannot"
        ):
            train(config)
    for path, content in whole.items():
        path.write_bytes(content)
    train(config, resume="auto")
    assert_same(tmp_path / "all", last_weights(tmp_path / "undisturbed"))
