"""Checkpoints: what goes in comes out bit for bit; damage, other models and a full disk are caught."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_stage1
from safetensors.torch import load_file
from torch import nn

from qformers.errors import CheckpointError
from qformers.models.freezing import freeze
from qformers.training import checkpoint as module
from qformers.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    trainable_state,
)
from qformers.training.config import OptimiserConfig
from qformers.training.optimiser import build_optimiser


def trained(seed=0, steps=2, **settings):
    """A tiny model after some steps on random gradients, and its optimiser."""
    model = tiny_stage1(seed, **settings)
    optimiser = build_optimiser(model, OptimiserConfig(lr=1e-2))
    walk(model, optimiser, steps)
    return model, optimiser


def walk(model, optimiser, steps):
    torch.manual_seed(steps)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimiser.step()


def test_loading_gives_the_same_next_steps(tmp_path):
    model, optimiser = trained()
    saved = save_checkpoint(tmp_path, Snapshot.take(2, model, optimiser), keep=3)
    other, other_optimiser = trained(seed=1, steps=5)
    assert load_checkpoint(saved, other, other_optimiser) == 2
    for pair in ((model, optimiser), (other, other_optimiser)):
        walk(*pair, steps=3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class WithFrozen(nn.Module):
    """A frozen part and a trained part, each with a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        freeze(self.frozen, "frozen")


def test_frozen_parameters_and_buffers_are_absent(tmp_path):
    model = WithFrozen()
    saved = save_checkpoint(tmp_path, Snapshot.take(1, model, build_optimiser(model, OptimiserConfig())), keep=1)
    names = {f"trained.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert load_file(saved / "model.safetensors").keys() == names == trainable_state(model).keys()


def test_only_the_last_are_kept(tmp_path):
    model, optimiser = trained()
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, Snapshot.take(step, model, optimiser), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, name, damage):
    model, optimiser = trained()
    good = save_checkpoint(tmp_path, Snapshot.take(1, model, optimiser), keep=2)
    file = save_checkpoint(tmp_path, Snapshot.take(2, model, optimiser), keep=2) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-10])
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == good
    assert "step_00000002: damaged" in caplog.text


def test_a_damaged_later_checkpoint_never_displaces_a_good_one(tmp_path):
    model, optimiser = trained()
    for step in (10, 20):
        save_checkpoint(tmp_path, Snapshot.take(step, model, optimiser), keep=1 if step == 10 else 2)
    (tmp_path / "step_00000020" / "model.safetensors").unlink()
    saved = save_checkpoint(tmp_path, Snapshot.take(15, model, optimiser), keep=1)
    assert newest_checkpoint(tmp_path) == saved
    assert list_checkpoints(tmp_path) == [saved]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_queries": 5}, r"qformer.query_tokens has shape \(4, 32\), this model's \(5, 32\)"),
        ({"cross_attention_frequency": 1}, "lacks qformer.blocks.1.cross_attention"),
    ],
)
def test_another_models_checkpoint_is_refused_by_name(tmp_path, settings, said):
    saved = save_checkpoint(tmp_path, Snapshot.take(1, *trained()), keep=1)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(saved, *trained(**settings))


def test_a_checkpoint_with_more_than_the_model_trains_is_refused(tmp_path):
    saved = save_checkpoint(tmp_path, Snapshot.take(1, *trained(cross_attention_frequency=1)), keep=1)
    with pytest.raises(CheckpointError, match=r"holds qformer\.blocks\.1\.cross_attention"):
        load_checkpoint(saved, *trained())


@pytest.mark.parametrize("fails_at", ["model.safetensors", "optimiser.safetensors", "state.json"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, fails_at):
    model, optimiser = trained()
    good = save_checkpoint(tmp_path, Snapshot.take(1, model, optimiser), keep=1)

    def sync(path, original=module._sync):
        if path.name == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    monkeypatch.setattr(module, "_sync", sync)
    with pytest.raises(CheckpointError, match="No space left on device; the last checkpoint is step_00000001") as error:
        save_checkpoint(tmp_path, Snapshot.take(2, model, optimiser), keep=1)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [good]
    assert newest_checkpoint(tmp_path) == good


LIMITED = """
import resource, sys
from pathlib import Path
from helpers import tiny_stage1
from qformers.errors import CheckpointError
from qformers.training.checkpoint import Snapshot, newest_checkpoint, save_checkpoint
from qformers.training.config import OptimiserConfig
from qformers.training.optimiser import build_optimiser

folder = Path(sys.argv[1])
model = tiny_stage1()
optimiser = build_optimiser(model, OptimiserConfig())
save_checkpoint(folder, Snapshot.take(1, model, optimiser), keep=1)
size = (folder / "step_00000001" / "model.safetensors").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
try:
    save_checkpoint(folder, Snapshot.take(2, model, optimiser), keep=1)
except CheckpointError as error:
    print(error)
    print(newest_checkpoint(folder).name, sorted(path.name for path in folder.iterdir()))
"""


def test_a_file_that_the_system_refuses_to_grow(tmp_path):
    """The real writer meets a real limit (the operating system's, on the size of a file)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, tmp_path]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    refusal, survivors = child.stdout.splitlines()
    assert refusal.startswith(f"cannot save {tmp_path}/step_00000002: ")
    assert survivors == "step_00000001 ['step_00000001']", child.stderr


def test_state_names_its_step_and_sums(tmp_path):
    saved = save_checkpoint(tmp_path, Snapshot.take(7, *trained()), keep=1)
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == 7
    assert set(state["sha256"]) == {"model.safetensors", "optimiser.safetensors"}
