"""The Python contract, on a model trained for a few steps: shapes, batch invariance, saving, clear errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy_run import toy_config, write_toy_data

import qformers
from qformers.cli import main
from qformers.errors import CheckpointError, DataError
from qformers.evaluation.retrieval import retrieval_metrics
from qformers.training.loop import train

TEXTS = ["a red square", "the picture of a dark blue line", "circle"]
# Batching changes the order of fp32 sums, nothing else.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("predictor")
    write_toy_data(data)
    train(toy_config(data, data / "run", steps=6, precision="fp32"))
    return data


@pytest.fixture(scope="module")
def model(folder):
    return qformers.load(folder / "run")


@pytest.fixture(scope="module")
def pictures(folder):
    return [folder / f"{number}.png" for number in range(3)]


def test_encodings_have_the_promised_shapes(model, pictures):
    images = model.encode_image(model.preprocess(pictures))
    assert images.patch_embeds.shape == (3, 5, 16)
    assert images.query_outputs.shape == (3, 4, 32)
    assert images.features.shape == (3, 4, 16)
    torch.testing.assert_close(images.features.norm(dim=-1), torch.ones(3, 4))
    texts = model.encode_text(TEXTS)
    torch.testing.assert_close(texts.features.norm(dim=-1), torch.ones(3))
    by_hand = torch.einsum("iqd,td->itq", images.features, texts.features).amax(-1)
    torch.testing.assert_close(model.itc(pictures, TEXTS), by_hand, **TOLERANCE)


def test_one_or_many_gives_the_same_answer(model, pictures):
    together = model.itc(pictures, TEXTS)
    alone = torch.cat([torch.cat([model.itc(picture, text) for text in TEXTS], dim=1) for picture in pictures])
    torch.testing.assert_close(together, alone, **TOLERANCE)
    torch.testing.assert_close(
        model.match(pictures, TEXTS),
        torch.cat([model.match(picture, text) for picture, text in zip(pictures, TEXTS, strict=True)]),
        **TOLERANCE,
    )
    against_all = model.match(pictures[0], TEXTS)
    repeated = model.match([pictures[0]] * 3, TEXTS)
    torch.testing.assert_close(against_all, repeated, **TOLERANCE)
    assert ((against_all > 0) & (against_all < 1)).all()


def test_paths_pictures_and_arrays_are_the_same_picture(model, pictures):
    with Image.open(pictures[0]) as opened:
        for given in (str(pictures[0]), pictures[0].read_bytes(), opened, np.asarray(opened)):
            torch.testing.assert_close(model.preprocess(given), model.preprocess(pictures[0]))


def test_attention_is_a_distribution_over_cls_and_patches(model, pictures):
    maps = model.attention(pictures[0])
    assert maps.shape == (1, 4, 2, 2)  # the tiny preset cross-attends in block 0 alone
    totals = maps.sum(dim=(-1, -2))
    assert (maps >= 0).all() and (totals <= 1 + 1e-6).all() and (totals > 0.1).all()
    # Block 0 reads the image after self-attention, so a text changes where the queries look.
    assert not torch.allclose(maps, model.attention(pictures[0], "a red square"))


def test_saved_model_comes_back_bit_for_bit(model, pictures, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = qformers.load(tmp_path / "again")
    assert torch.equal(model.itc(pictures, TEXTS), again.itc(pictures, TEXTS))
    assert torch.equal(model.match(pictures, TEXTS), again.match(pictures, TEXTS))
    assert "frozen" in (tmp_path / "again" / "README.md").read_text()


def test_what_cannot_be_done_is_said_in_one_line(model, pictures, tmp_path):
    with pytest.raises(DataError, match="3 pictures and 2 texts"):
        model.match(pictures, TEXTS[:2])
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        model.encode_text(["a", "  "])
    with pytest.raises(DataError, match=r"missing\.png"):
        model.preprocess(tmp_path / "missing.png")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        qformers.load(tmp_path)
    model.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        qformers.load(tmp_path / "cut")


def test_evaluate_command_equals_brute_force(model, folder, capsys):
    """Re-ranking everything, against every pair scored alone."""
    arguments = ["evaluate", "retrieval", "--model", str(folder / "run"), "--data", str(folder / "pairs.jsonl")]
    assert main([*arguments, "--rerank", "16", "--json", str(folder / "metrics.json")]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "i2t_r1" in capsys.readouterr().out

    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    images, texts = [folder / record["image"] for record in records], [record["caption"] for record in records]
    stage1, itc = model.model, model.itc(images, texts)
    own = np.arange(len(texts))
    for name, value in retrieval_metrics(itc, own).items():
        assert metrics[name] == pytest.approx(value), name

    patches = model.encode_image(model.preprocess(images)).patch_embeds
    with torch.inference_mode():
        scores = itc + torch.tensor(
            [
                [
                    stage1.match_logits([stage1.remember(image[None])], *model.tokenizer.encode([text]))[0, 1]
                    for text in texts
                ]
                for image in patches
            ]
        )
    for name, value in retrieval_metrics(scores, own).items():
        assert metrics[f"reranked_{name}"] == pytest.approx(value), name


def test_match_and_inspect_commands(folder, pictures, capsys):
    run = str(folder / "run")
    assert main(["match", str(pictures[0]), *TEXTS, "--model", run, "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert [pair["text"] for pair in judged] == TEXTS
    assert (
        main(["inspect", str(pictures[0]), "--text", TEXTS[0], "--model", run, "--output", str(folder / "a.png")]) == 0
    )
    with Image.open(folder / "a.png") as drawn:
        assert drawn.width > 500
