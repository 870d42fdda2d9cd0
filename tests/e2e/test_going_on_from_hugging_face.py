"""A checkpoint of Hugging Face's is converted, trained further here, and handed back."""

from __future__ import annotations

import json

import pytest
import torch
from toy_blip2 import save_toy, toy_bert
from toy_run import toy_config, write_toy_data
from transformers import Blip2ForConditionalGeneration

import qformers
from qformers.convert.run import convert
from qformers.data.config import TransformConfig
from qformers.errors import ConfigError
from qformers.models.config import ModelConfig
from qformers.training.loop import train


def config_from(folder, start, **settings):
    """A recipe for stage 2 from `start`, around the image encoder of the same checkpoint."""
    model = ModelConfig(
        vision_encoder=str(folder / "hf"),
        text_encoder=str(folder / "bert"),
        preset="tiny",
        start_from_text_encoder=False,
        num_queries=4,
    )
    return toy_config(folder, folder / "run", model=model, stage=2, start=str(start), precision="fp32", **settings)


def test_a_converted_checkpoint_is_trained_further_and_handed_back(tmp_path):
    write_toy_data(tmp_path)
    save_toy("opt", tmp_path / "hf")
    toy_bert(tmp_path / "parts").save_pretrained(tmp_path / "bert")
    convert(tmp_path / "hf", tmp_path / "start", "qformers")
    config = config_from(tmp_path, tmp_path / "start")
    assert config.data.transform == TransformConfig(image_px=28)
    trained = train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss/lm"] < rows[0]["loss/lm"]
    description = json.loads((trained.model / "config.json").read_text())
    assert description["qformer"]["has_text"] is False and description["vision_norm_eps"] == 1e-6

    convert(trained.model, tmp_path / "back", "hf")
    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values())
    ours = qformers.load(trained.model)
    pixels = ours.preprocess([tmp_path / "0.png", tmp_path / "1.png"])
    with torch.no_grad():
        visual = ours.model.visual_prompts(ours.model.vision_encoder(pixels))
        expected = theirs.eval().get_image_features(pixels, return_dict=True).pooler_output
    torch.testing.assert_close(visual, expected, atol=1e-5, rtol=0)


def test_a_q_former_that_reads_instructions_is_not_trained_without_them(tmp_path):
    write_toy_data(tmp_path)
    save_toy("instruct_llama", tmp_path / "hf")
    toy_bert(tmp_path / "parts").save_pretrained(tmp_path / "bert")
    convert(tmp_path / "hf", tmp_path / "start", "qformers")
    with pytest.raises(ConfigError, match="reads instructions"):
        train(config_from(tmp_path, tmp_path / "start"))
