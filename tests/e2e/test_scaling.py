"""Runs on several processes, sharded, in micro-batches and in half precision; and what is left when a process stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import run_worker
import torch
from safetensors.torch import load_file
from torch.multiprocessing import start_processes
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import metric_rows, toy_config, write_toy_data

from qformers.errors import ConfigError
from qformers.models.config import LanguageConfig
from qformers.models.saving import load_model
from qformers.training.config import OptimiserConfig, TrainConfig
from qformers.training.loop import train

STEPS = 20
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_toy_data(folder, pictures=32)
    for family in ("gpt2", "t5"):
        toy_transformers_model(family).save_pretrained(folder / family)
        toy_tokenizer(folder / family, ends=family == "t5")
    return folder


def config_of(data: Path, output: Path, **settings) -> TrainConfig:
    """20 steps of 8 pictures without dropout, which is drawn by each process for itself."""
    config = toy_config(data, output, **{"steps": STEPS, "precision": "fp32", "evaluate_every_steps": 10, **settings})
    model = replace(config.model, dropout=0.0, attention_dropout=0.0)
    slow = OptimiserConfig(lr=3e-4, warmup_steps=3)
    return replace(config, model=model, data=replace(config.data, batch_size=8), optimiser=slow)


def on_two_processes(config: TrainConfig) -> None:
    arguments = (2, run_worker.free_port(), config)
    start_processes(run_worker.run, args=arguments, nprocs=2, start_method="forkserver")


def assert_same_run(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    """Every logged loss of two runs, and the weights: AdamW moves each by up to 6e-3, one without gradient by rounding.

    `unit/test_distributed.py` compares weights in float64.
    """
    for first, second in zip(metric_rows(one), metric_rows(two), strict=True):
        for name in first:
            if "loss" in name or "validation" in name or name in ("grad_norm", "token_accuracy", "itm_accuracy"):
                assert second[name] == pytest.approx(first[name], rel=tolerance), (name, first["step"])
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if name.endswith("qkv.bias"):
            # A key's bias has no effect, so its gradient is rounding, which AdamW makes steps of.
            dim = len(tensor) // 3
            tensor, found[name] = (torch.cat([bias[:dim], bias[2 * dim :]]) for bias in (tensor, found[name]))
        torch.testing.assert_close(
            found[name], tensor, atol=5 * tolerance, rtol=0, msg=lambda text, name=name: name + text
        )


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory) -> Path:
    """A run on one process."""
    output = tmp_path_factory.mktemp("stage1") / "run"
    train(config_of(data, output))
    return output


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_run_on_two_processes_is_the_run_on_one(data, forking, stage1, tmp_path, micro_batch_size):
    on_two_processes(config_of(data, tmp_path / "run", micro_batch_size=micro_batch_size))
    assert_same_run(stage1, tmp_path / "run")


def test_a_run_in_micro_batches_is_the_run_in_whole_ones(data, stage1, tmp_path):
    train(config_of(data, tmp_path / "run", micro_batch_size=3))
    assert_same_run(stage1, tmp_path / "run")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_sharded_stage_2_is_the_unsharded_one(data, forking, stage1, tmp_path, family):
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    settings = {"stage": 2, "start": str(stage1), "language": LanguageConfig(path=str(data / family))}
    train(config_of(data, whole, **settings))
    on_two_processes(config_of(data, sharded, **settings, shard_frozen_models=True, checkpoint_layers=True))
    assert_same_run(whole, sharded)
    held = [tuple(map(int, (tmp_path / f"sharded_{rank}.held").read_text().split())) for rank in range(2)]
    assert sum(here for here, _ in held) == held[0][1] > 20_000
    assert max(here for here, _ in held) < 0.6 * held[0][1]
    files = [run / "model" / "language_model" / "model.safetensors" for run in (whole, sharded)]
    before, after = map(load_file, files)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    expected, found = (load_model(run / "model").model.state_dict() for run in (whole, sharded))
    assert expected.keys() == found.keys()


def test_layers_computed_twice_change_nothing(data, tmp_path):
    """Bit for bit, dropout included."""
    runs = [tmp_path / "kept", tmp_path / "twice"]
    for output, twice in zip(runs, (False, True), strict=True):
        train(toy_config(data, output, steps=4, precision="fp32", checkpoint_layers=twice))
    kept, twice = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(twice[name], tensor) for name, tensor in kept.items())


def test_fp16_scales_its_loss_and_goes_on_with_the_scale(data, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(toy_config(data, whole, precision="fp16"))
    rows = metric_rows(whole)
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert rows[-1]["loss_scale"] < 2**16, "the first steps are too large for the first scale"
    train(toy_config(data, resumed, precision="fp16", steps=7))
    train(toy_config(data, resumed, precision="fp16"), resume="auto")
    assert [row["loss_scale"] for row in metric_rows(resumed)] == [row["loss_scale"] for row in rows]


def test_two_kinds_of_half_are_refused(data, stage1, tmp_path):
    language = LanguageConfig(path=str(data / "gpt2"), dtype="bfloat16")
    with pytest.raises(ConfigError, match="precision is fp16 and the language model is bfloat16: torch mixes no two"):
        train(config_of(data, tmp_path / "run", precision="fp16", stage=2, start=str(stage1), language=language))


COMPILED = """
import torch
from helpers import random_batch, tiny_stage1
from torch._dynamo.utils import counters
from qformers.training.scaling import compile_layers

model, batch = tiny_stage1(cross_attention_frequency=1).eval(), random_batch([4, 6, 3])
with torch.no_grad():
    expected = model.encode_image(batch.patch_embeds).image_features
    compile_layers(model)
    found = model.encode_image(batch.patch_embeds).image_features
torch.testing.assert_close(found, expected)
assert counters["stats"]["unique_graphs"] >= 2, counters  # the compiler's trial is one
"""


def test_compiled_blocks_compute_the_same():
    """In a process of its own: the checks of shapes that the tests run under cannot be compiled."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True, timeout=5 * PATIENCE_SECONDS)


def test_compiling_without_a_compiler_is_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no_compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"compile needs a working C\+\+ compiler \(.*\): install g\+\+, or set it"):
        train(toy_config(data, tmp_path / "run", compile=True))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP, None], ids=["killed", "stopped", "hangs"])
def test_a_process_that_stops_is_named_and_ends_the_run(data, forking, tmp_path, sent):
    config = config_of(data, tmp_path / "run", timeout_seconds=8.0, checkpoint_every_steps=2)
    context = multiprocessing.get_context("forkserver")
    arguments = (2, run_worker.free_port(), config, sent)
    processes = [context.Process(target=run_worker.run_and_stop, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        processes[0].join(PATIENCE_SECONDS)
        assert processes[0].exitcode == 1, "the other process waits for ever"
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = (tmp_path / "run_0.err").read_text()
    assert f"process 1 of 2 ({os.uname().nodename}, pid {processes[1].pid})" in said
    assert said.strip().endswith("go on with --resume auto")
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
