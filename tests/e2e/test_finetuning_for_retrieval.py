"""Stage 1 goes on from stage 1 with the image encoder, and Karpathy's files are what it is scored on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_run import WORDS, toy_config, write_toy_data

import qformers
from qformers.cli import main
from qformers.errors import CheckpointError, ConfigError
from qformers.evaluation import run as evaluation
from qformers.evaluation.retrieval import retrieval_metrics
from qformers.models.config import LanguageConfig
from qformers.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    write_toy_data(folder)
    train(toy_config(folder, folder / "stage1", steps=4, precision="fp32"))
    return folder


def finetuning(data, output, **settings):
    config = toy_config(data, output, precision="fp32", start=str(data / "stage1"), **{"steps": 5, **settings})
    trained = replace(config.model, train_vision_encoder=True)
    return replace(config, model=trained, optimiser=replace(config.optimiser, vision_layer_decay=0.5))


def test_finetuning_starts_from_every_weight_and_trains_the_image_encoder(data, tmp_path):
    config = finetuning(data, tmp_path / "still")
    no_step = replace(config.optimiser, lr=1e-30, min_lr=0.0, warmup_steps=0)
    start = load_file(data / "stage1" / "model" / "model.safetensors")
    same = load_file(train(replace(config, steps=1, optimiser=no_step)).model / "model.safetensors")
    assert start.keys() == same.keys()
    for name, tensor in start.items():
        torch.testing.assert_close(same[name], tensor, atol=1e-12, rtol=0)
    moved = load_file(train(finetuning(data, tmp_path / "moved")).model / "model.safetensors")
    for part in ("vision_encoder.", "vision_norm.", "qformer.", "itm_head.", "vision_projection.", "temperature"):
        assert any(not moved[name].equal(start[name]) for name in start if name.startswith(part)), part


def test_what_stage_1_cannot_start_from(data, tmp_path):
    with pytest.raises(ConfigError, match=r"language\.path belongs to stage 2"):
        finetuning(data, tmp_path / "run", language=LanguageConfig(path="gpt2"))
    stage2 = tmp_path / "stage2"
    stage2.mkdir()
    (stage2 / "config.json").write_text(json.dumps({"format": "qformers-stage2"}))
    with pytest.raises(CheckpointError, match="of stage 2 and has no heads for retrieval"):
        train(replace(finetuning(data, tmp_path / "run"), start=str(stage2)))
    other = finetuning(data, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"reads texts by cls, the recipe's by mean: set model\.text_readout"):
        train(replace(other, model=replace(other.model, text_readout="mean")))


def karpathy(folder, captions):
    """A file of Karpathy's: pictures of train and test, the test's with so many sentences each."""
    images = [{"split": "train", "filename": "15.png", "cocoid": 99, "sentences": [{"raw": "a line"}]}]
    for number, count in enumerate(captions):
        sentences = [{"raw": f"{WORDS[number + 4]} {WORDS[more]} of a {WORDS[more + 3]}"} for more in range(count)]
        images.append({"split": "test", "filename": f"{number}.png", "cocoid": number, "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return [[sentence["raw"] for sentence in image["sentences"]] for image in images[1:]]


def test_karpathys_five_captions_an_image_scored_by_every_rule(data, capsys):
    sentences = karpathy(data, [5, 6, 7, 5])
    line = ["evaluate", "retrieval", "--model", str(data / "stage1"), "--data", str(data / "dataset_coco.json")]
    line += ["--split", "test", "--captions_per_image", "5", "--json", str(data / "figures.json"), "--rerank", "64"]
    model = qformers.load(data / "stage1")
    texts = [text for of_image in sentences for text in of_image[:5]]
    owners, pictures = np.repeat(np.arange(4), 5), [data / f"{number}.png" for number in range(4)]
    itc = model.itc(pictures, texts).numpy()
    logits = np.stack([model.match_logits(picture, texts).numpy() for picture in pictures])
    temperature = model.model.temperature.item()
    for rule, scores in (
        ("itm", logits[..., 1]),
        ("itm+itc", logits[..., 1] + itc),
        ("itm+itc/temperature", logits[..., 1] - logits[..., 0] + itc / temperature),
    ):
        assert main([*line, "--rule", rule]) == 0
        figures = json.loads((data / "figures.json").read_text())
        assert (figures["images"], figures["texts"]) == (4, 20)
        expected = retrieval_metrics(scores, owners)
        assert {name: figures[f"reranked_{name}"] for name in expected} == pytest.approx(expected), rule
    assert "reranked_i2t_median_rank" in capsys.readouterr().out


def test_a_killed_evaluation_goes_on_from_its_scores(data, monkeypatch, capsys):
    karpathy(data, [5, 5, 5, 5])
    line = ["evaluate", "retrieval", "--model", str(data / "stage1"), "--data", str(data / "pairs.jsonl")]
    line += ["--rerank", "16", "--json", str(data / "figures.json"), "--scores", str(data / "scores")]
    monkeypatch.setattr("qformers.evaluation.scoring.IMAGES_AT_ONCE", 3)
    asked: list[list[int]] = []
    patches_of = evaluation.patches_of

    def stop_after_two(encoder, view, rows):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(list(rows))
        return patches_of(encoder, view, rows)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(evaluation, "patches_of", stop_after_two)
        assert main(line) == 130
    assert asked == [[0, 1, 2], [3, 4, 5]]
    asked.clear()
    monkeypatch.setattr(evaluation, "patches_of", lambda *given: asked.append(list(given[2])) or patches_of(*given))
    assert main(line) == 0
    assert asked[0] == [6, 7, 8] and asked[-1] == [15]
    resumed = json.loads((data / "figures.json").read_text())
    assert main(line[:-2]) == 0
    assert json.loads((data / "figures.json").read_text()) == resumed
    assert main([*line, "--captions_per_image", "1", "--rerank", "2"]) == 1
    assert "holds something else" in capsys.readouterr().err
