"""Whole runs on toy data: what they leave behind, what stops them, and what stopping leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import load_file
from toy_run import metric_rows, toy_config, write_toy_data

from qformers.data.images import load_image
from qformers.data.transforms import evaluation_transform, transform_for
from qformers.errors import CheckpointError, ConfigError, DataError
from qformers.models.saving import load_model
from qformers.models.vision import VisionEncoder
from qformers.objectives.stage1 import Stage1Objective
from qformers.training.config import TrainConfig
from qformers.training.features import precompute
from qformers.training.logging import RunLog, drop_rows_from
from qformers.training.loop import NonFiniteLossError, TrainingStoppedError, train
from qformers.training.setup import build_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_toy_data(folder)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that nothing disturbed."""
    config = toy_config(data, tmp_path_factory.mktemp("runs") / "finished")
    return config, train(config)


def last_weights(output):
    return load_file(output / "checkpoints" / "step_00000012" / "model.safetensors")


def assert_same_end(output, finished):
    expected = last_weights(finished[1].model.parent)
    for name, weights in last_weights(output).items():
        assert torch.equal(weights, expected[name]), name


def test_run_folder_holds_what_it_promises(finished):
    config, result = finished
    output = result.model.parent
    rows = metric_rows(output)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["loss/total"] == pytest.approx(row["loss/itc"] + row["loss/itm"] + row["loss/itg"], rel=1e-5)
        assert {"lr", "grad_norm", "images_per_second", "temperature"} <= row.keys()
        assert ("validation/itc" in row) == (row["step"] in (6, 12))
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert result.metrics["loss/itg"] == rows[-1]["loss/itg"]
    assert "step 12/12" in (output / "train.log").read_text()
    assert list((output / "tensorboard").glob("events*"))
    loaded = load_model(result.model)
    saved = loaded.stage1()
    assert loaded.config == config.model
    for name, weights in last_weights(output).items():
        assert torch.equal(saved.state_dict()[name], weights), name
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step_00000006",  # of the lowest validation loss when it was written
        "step_00000010",
        "step_00000012",
    ]


def test_kept_config_makes_the_same_run(finished):
    config, result = finished
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, None)
    kept = parser.instantiate(parser.parse_string((result.model.parent / "config.yaml").read_text()))
    assert TrainConfig(**{name: kept[name] for name in vars(config)}) == config


def test_an_occupied_folder_is_not_overwritten(finished):
    with pytest.raises(ConfigError, match="already holds a run; use --resume auto or another --output"):
        train(finished[0])


def test_resuming_another_shape_is_one_line_and_changes_nothing(data, finished):
    output = finished[1].model.parent
    before = (output / "metrics.jsonl").read_bytes()
    other = toy_config(data, output, model=replace(finished[0].model, num_queries=7))
    with pytest.raises(CheckpointError, match=r"query_tokens has shape \(4, 32\), this model's \(7, 32\)"):
        train(other, resume="auto")
    assert (output / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_does_harm(data, tmp_path, monkeypatch, finished):
    calls, forward = [], Stage1Objective.forward

    def poisoned(self, batch, *rest):
        output = forward(self, batch, *rest)
        calls.append(batch.names)
        if len(calls) == 4:
            output.losses["itm"] = output.losses["itm"] * math.nan
        return output

    monkeypatch.setattr(Stage1Objective, "forward", poisoned)
    config = toy_config(data, tmp_path / "run")
    with pytest.raises(NonFiniteLossError, match="loss itm is nan in step 4 on ") as stopped:
        train(config)
    listed = (tmp_path / "run" / "not_finite_step_00000004.txt").read_text().split()
    assert tuple(listed) == calls[3]
    assert all(name in str(stopped.value) for name in calls[3])
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    train(config, resume="auto")
    assert_same_end(tmp_path / "run", finished)


def test_sigterm_saves_and_the_run_goes_on_later(data, tmp_path, monkeypatch, finished):
    write = RunLog.write

    def write_then_signal(self, step, values):
        write(self, step, values)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "write", write_then_signal)
    config = toy_config(data, tmp_path / "run")
    with pytest.raises(TrainingStoppedError, match="stopped after step 8 of 12; go on with --resume auto"):
        train(config)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config, resume="auto")
    assert_same_end(tmp_path / "run", finished)


def test_changed_settings_are_named_when_a_run_goes_on(data, tmp_path):
    train(toy_config(data, tmp_path / "run"))
    train(toy_config(data, tmp_path / "run", steps=14), resume="auto")
    assert "steps was 12 and is now 14" in (tmp_path / "run" / "train.log").read_text()
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == list(range(1, 15))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 14


def test_a_broken_picture_is_named_and_skipped_until_there_are_too_many(tmp_path):
    write_toy_data(tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    tolerant = toy_config(tmp_path, tmp_path / "tolerant")
    train(replace(tolerant, data=replace(tolerant.data, max_broken_fraction=0.1)))
    named = (tmp_path / "tolerant" / "broken_images.log").read_text().splitlines()
    assert len(named) == 1
    assert named[0].startswith("3.png\t")
    with pytest.raises(DataError, match=r"limit is 1\.0%"):
        train(replace(tolerant, output=str(tmp_path / "strict"), data=replace(tolerant.data, batch_size=16)))


def test_twins_meet_in_every_batch_of_a_run(tmp_path, monkeypatch):
    write_toy_data(tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    pairs.write_text("".join(json.dumps(row | {"film": number % 8}) + "\n" for number, row in enumerate(rows)))
    config = toy_config(tmp_path, tmp_path / "run")
    config = replace(config, data=replace(config.data, together_column="film", batch_size=4))
    films = []
    forward = Stage1Objective.forward

    def watched(objective, batch, *rest):
        films.append(sorted(int(Path(name).stem) % 8 for name in batch.names))
        return forward(objective, batch, *rest)

    monkeypatch.setattr(Stage1Objective, "forward", watched)
    train(replace(config, data=replace(config.data, validation=[])))
    assert len(films) == 12 and all(
        first == second for row in films for first, second in zip(row[::2], row[1::2], strict=True)
    )
    missing = replace(config, output=str(tmp_path / "other"), data=replace(config.data, together_column="shot"))
    with pytest.raises(DataError, match=r"pairs.jsonl: no column 'shot'; there are: .*film.* Set data.together_column"):
        train(missing)
    streamed = [replace(config.data.train[0], stream=True)]
    with pytest.raises(ConfigError, match=r"data\.together_column: records of streamed sources"):
        replace(config.data, train=streamed)


def test_features_take_the_encoders_place(data, tmp_path, monkeypatch):
    config = toy_config(data, tmp_path / "run", features=tmp_path / "features", precision="bf16")
    store = precompute(config)
    assert (store.records, store.views) == (16, 2)
    encoder = build_encoder(config)
    picture = evaluation_transform(load_image(data / "5.png"), transform_for(encoder, config.data.transform))
    with torch.no_grad():
        expected = encoder(picture[None])[0]
    torch.testing.assert_close(store.read(5, 0), expected)
    assert not torch.equal(store.read(5, 1), store.read(5, 0))

    def never(self, pixel_values):
        raise AssertionError("the encoder ran")

    without_validation = replace(config.data, validation=[])
    config = replace(config, data=without_validation)
    with monkeypatch.context() as patched:
        patched.setattr(VisionEncoder, "forward", never)
        train(config)
    assert len(metric_rows(tmp_path / "run")) == 12

    stale = replace(config, output=str(tmp_path / "stale"), precision="fp32")
    with pytest.raises(DataError, match="features are stale, `encoder` was"):
        train(stale)


TWO_PROCESSES = """
import sys
from dataclasses import replace
from pathlib import Path
from toy_run import toy_config
from qformers.objectives.config import Stage1LossConfig
from qformers.training.loop import train

data, output = map(Path, sys.argv[1:])
config = toy_config(data, output, accumulation_steps=2, steps=6, objectives=Stage1LossConfig(itc_steps=2))
train(replace(config, data=replace(config.data, max_broken_fraction=0.5)))
"""


def test_two_processes_train_one_model_even_when_one_has_a_broken_picture(tmp_path):
    write_toy_data(tmp_path)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "script.py", tmp_path, tmp_path / "run"]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    assert "2 process(es) on cpu" in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "run" / "broken_images.log").read_text().startswith("3.png\t")
    rows = metric_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ["loss/itm" in row for row in rows] == [False, False, True, True, True, True]
    assert rows[-1]["loss/itc"] < rows[0]["loss/itc"]


def test_a_start_that_fails_leaves_the_folder_free(data, tmp_path):
    config = toy_config(data, tmp_path / "run")
    with pytest.raises(DataError, match="16 records, the batch size is 99"):
        train(replace(config, data=replace(config.data, batch_size=99)))
    assert not (tmp_path / "run").exists()


def test_impossible_settings_are_refused_with_their_numbers(data, tmp_path):
    with pytest.raises(ConfigError, match="warmup_steps is 3 and steps is 3"):
        toy_config(data, tmp_path, steps=3)
    with pytest.raises(ConfigError, match="accumulation_steps is 0: must be at least 1"):
        toy_config(data, tmp_path, accumulation_steps=0)
    with pytest.raises(ConfigError, match=r"data\.max_broken_fraction is 1\.5: must be between 0\.0 and 1\.0"):
        replace(toy_config(data, tmp_path).data, max_broken_fraction=1.5)


def test_rows_of_the_repeated_part_and_half_written_ones_are_dropped(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_rows_from(metrics, first_step=3)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
