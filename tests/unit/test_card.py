"""The card of a saved model: read by huggingface_hub, and true of the run that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from toy_blip2 import save_toy
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import metric_rows, toy_config, write_toy_data

import qformers
from qformers.convert.run import convert
from qformers.models.card import UNKNOWN_LICENCE, licence_of, model_card, without_secrets
from qformers.models.config import LanguageConfig
from qformers.training.loop import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`stage1` and `stage2` of a few steps; the encoder's folder says its licence."""
    folder = tmp_path_factory.mktemp("cards")
    write_toy_data(folder)
    (folder / "encoder" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# An encoder\n")
    toy_transformers_model("gpt2").save_pretrained(folder / "gpt2")
    toy_tokenizer(folder / "gpt2")
    train(toy_config(folder, folder / "stage1", steps=6, precision="fp32"))
    speaker = {"stage": 2, "start": str(folder / "stage1"), "language": LanguageConfig(path=str(folder / "gpt2"))}
    train(toy_config(folder, folder / "stage2", steps=4, precision="fp32", **speaker))
    return folder


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_writes_where_its_model_comes_from(stage, runs):
    run = runs / f"stage{stage}"
    card = card_of(run / "model")
    assert card.data.library_name == "qformers" and f"stage-{stage}" in card.data.tags
    assert "base_model" not in card.data.to_dict()  # folders of this machine
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe == yaml.safe_load((run / "config.yaml").read_text())
    assert f"- `{runs / 'pairs.jsonl'}`" in card.text and "16 records" in card.text
    assert "`encoder` (cc-by-4.0)" in card.text and f"`text` ({UNKNOWN_LICENCE})" in card.text
    last = metric_rows(run)[-1]
    for name in ("loss/itc", "validation/itm", "itm_accuracy") if stage == 1 else ("loss/lm", "token_accuracy"):
        assert f"| {name} | {last[name]:.4g} |" in card.text
    assert "images_per_second |" not in card.text
    for heading in ("## Data", "## Recipe", "## Metrics", "## Limits"):
        assert card.text.count(heading) == 1


def test_the_card_goes_along_when_the_model_is_written_again(runs, tmp_path):
    before = (runs / "stage1/model/README.md").read_text()
    qformers.load(runs / "stage1").save_pretrained(tmp_path / "saved")
    convert(runs / "stage1", tmp_path / "converted", "qformers")
    assert before == (tmp_path / "saved/README.md").read_text() == (tmp_path / "converted/README.md").read_text()


def test_what_came_from_elsewhere_says_that_nothing_is_known(tmp_path):
    save_toy("opt", tmp_path / "theirs")
    (tmp_path / "theirs/README.md").write_text("---\nlicense: mit\n---\n# Not ours\n")
    qformers.load(tmp_path / "theirs").save_pretrained(tmp_path / "saved")
    text = card_of(tmp_path / "saved").text
    assert "Not ours" not in text and text.count("Not known here") == 2 and "None known here" in text


def test_hub_ids_are_named_as_what_the_model_is_based_on(runs, tmp_path):
    loaded = qformers.load(runs / "stage1").loaded
    config = replace(
        loaded.config, vision_encoder="facebook/dinov2-small", text_encoder="google-bert/bert-base-uncased"
    )
    (tmp_path / "README.md").write_text(model_card(loaded.model, config, None))
    card = card_of(tmp_path)
    assert card.data.base_model == ["facebook/dinov2-small", "google-bert/bert-base-uncased"]
    assert "`facebook/dinov2-small` (Apache-2.0)" in card.text


def test_licences(tmp_path):
    assert licence_of("openai/clip-vit-large-patch14") == "MIT"
    assert licence_of("somebody/clip-vit") == licence_of(str(tmp_path)) == UNKNOWN_LICENCE
    (tmp_path / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert licence_of(str(tmp_path)) == UNKNOWN_LICENCE


@pytest.mark.parametrize(
    ("given", "published"),
    [
        ("s3://key:word@bucket/a/*.tar", "s3://bucket/a/*.tar"),
        ("https://host/a.tar?sig=abc&x=1", "https://host/a.tar"),
        ("- path: 'https://host/a.tar?sig=abc'\n  split: train", "- path: 'https://host/a.tar'\n  split: train"),
        ("train-?.tar", "train-?.tar"),
        ("question_template: 'Question: {} Answer:'", "question_template: 'Question: {} Answer:'"),
    ],
)
def test_nothing_secret_of_an_address_is_published(given, published):
    assert without_secrets(given) == published
