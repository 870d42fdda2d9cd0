"""Captioners and rankers: ours and Hugging Face's behind one face, held against what they are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_capfilt import SAMPLING, save_toy_captioner, save_toy_ranker, write_toy_capfilt
from transformers import AutoTokenizer

import qformers
from qformers.capfilt.captioner import open_captioner
from qformers.capfilt.config import SamplingConfig
from qformers.capfilt.ranker import OwnRanker, open_ranker
from qformers.capfilt.stages import open_judge, open_models
from qformers.data.images import load_image
from qformers.errors import CheckpointError, ConfigError
from qformers.models.sampling import draws_for

TEXTS = [["a red cat", "the photo of a dog"], [], ["a tree"]]
NAMES = ["one", "two", "three", "four"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capfilt_models")
    write_toy_capfilt(folder, pictures=16)
    return folder


@pytest.fixture(scope="module")
def pictures(data):
    return [load_image(data / f"{number}.png") for number in range(4)]


@pytest.mark.parametrize("kind", ["ours", "blip", "git", "vit-gpt2"])
def test_captions_of_a_picture_do_not_depend_on_the_batch_or_the_order(kind, data, pictures, tmp_path):
    if kind != "ours":
        save_toy_captioner(kind, tmp_path / kind)
    captioner = open_captioner(str(data / "stage2" if kind == "ours" else tmp_path / kind), SAMPLING, "cpu")
    pixels = torch.stack([captioner.transform(picture) for picture in pictures])
    draws = draws_for(NAMES, 0, SAMPLING.captions, SAMPLING.max_new_tokens)

    def written(rows: list[int]) -> list[list[str]]:
        return captioner.write(captioner.encode(pixels[rows]), draws[rows])

    together = written([0, 1, 2, 3])
    assert [len(captions) for captions in together] == [4] * 4
    assert len({caption for captions in together for caption in captions}) > 4
    assert written([3, 1, 0, 2]) == [together[row] for row in (3, 1, 0, 2)]
    assert [written([row])[0] for row in range(4)] == together


def test_a_prompt_is_gone_on_from_and_is_no_part_of_the_caption(pictures, tmp_path):
    save_toy_captioner("git", tmp_path)
    asked = SamplingConfig(captions=2, max_new_tokens=6, min_new_tokens=2, prompt="a photo of")
    captioner = open_captioner(str(tmp_path), asked, "cpu")
    draws = draws_for(NAMES[:2], 0, 2, 6)
    pixels = torch.stack([captioner.transform(picture) for picture in pictures[:2]])
    said = captioner.write(pixels, draws)
    assert len(said) == 2 and all(len(caption.split()) <= 6 for captions in said for caption in captions)
    assert said != open_captioner(str(tmp_path), replace(asked, prompt=None), "cpu").write(pixels, draws)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_dual_encoder_s_scores_are_its_own_logits_without_scale(kind, pictures, tmp_path):
    model = save_toy_ranker(kind, tmp_path)
    ranker = open_ranker(str(tmp_path), "cpu")
    pixels = torch.stack([ranker.transform(picture) for picture in pictures[:3]])
    scores = ranker.score(ranker.encode(pixels), TEXTS)
    assert [len(found) for found in scores] == [2, 0, 1]
    words = ["a red cat", "the photo of a dog", "a tree"]
    longest = {"padding": "max_length", "max_length": 32} if kind == "siglip" else {"padding": True}
    read = AutoTokenizer.from_pretrained(tmp_path)(words, return_tensors="pt", **longest)
    read.pop("token_type_ids", None)
    with torch.inference_mode():
        if kind == "siglip":
            read.pop("attention_mask")
        logits = model(**read, pixel_values=pixels).logits_per_image
        logits = (logits - (model.logit_bias if kind == "siglip" else 0)) / model.logit_scale.exp()
    expected = [logits[0, 0], logits[0, 1], logits[2, 2]]
    torch.testing.assert_close(torch.tensor([*scores[0], *scores[2]]), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_our_scores_are_the_predictor_s(data, pictures):
    ranker, predictor = open_ranker(str(data / "stage1"), "cpu"), qformers.load(data / "stage1")
    assert isinstance(ranker, OwnRanker)
    encoded = ranker.encode(torch.stack([ranker.transform(picture) for picture in pictures[:3]]))
    for found, expected in ((ranker.score, predictor.itc), (ranker.match, predictor.match)):
        scores = found(encoded, TEXTS)
        by_hand = [
            expected(picture, text).item() for picture, texts in zip(pictures, TEXTS, strict=False) for text in texts
        ]
        assert [score for of_picture in scores for score in of_picture] == pytest.approx(by_hand, abs=1e-5)
        assert [len(of_picture) for of_picture in scores] == [2, 0, 1]


def test_one_encoder_is_known_as_one_whoever_has_it(data, tmp_path):
    models = open_models(str(data / "stage2"), str(data / "stage1"), SAMPLING, str(data / "stage1"), "cpu")
    assert models.captioner.encoder_key == models.ranker.encoder_key
    assert models.captioner.transform == models.ranker.transform
    assert models.judge is models.ranker and models.captioner.fingerprint != models.ranker.fingerprint
    save_toy_ranker("clip", tmp_path)
    assert open_ranker(str(tmp_path), "cpu").encoder_key != models.ranker.encoder_key


def test_what_cannot_be_used_is_refused_in_one_line(data, tmp_path):
    save_toy_ranker("clip", tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    clip = open_ranker(str(tmp_path / "clip"), "cpu")
    refused = [
        (lambda: open_captioner(str(data / "stage1"), SAMPLING, "cpu"), CheckpointError, "no language model"),
        (lambda: open_ranker(str(data / "stage2"), "cpu"), CheckpointError, "no ITC and ITM heads"),
        (lambda: open_captioner(str(tmp_path / "none"), SAMPLING, "cpu"), ConfigError, "neither a folder"),
        (lambda: open_captioner(str(tmp_path / "empty"), SAMPLING, "cpu"), CheckpointError, "config.json is missing"),
        (lambda: open_captioner(str(tmp_path / "clip"), SAMPLING, "cpu"), CheckpointError, "no captioner can be read"),
        (lambda: open_ranker(str(data / "gpt2"), "cpu"), CheckpointError, "image processor cannot be read"),
        (lambda: open_judge(str(tmp_path / "clip"), "", clip, "cpu"), ConfigError, "has no ITM head"),
    ]
    for opened, error, said in refused:
        with pytest.raises(error, match=said) as caught:
            opened()
        assert "\n" not in str(caught.value)
