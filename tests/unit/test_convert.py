"""Conversions: bits survive every round trip, and bad checkpoints get one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hf_blip2 import TOY_VISION
from safetensors.torch import load_file, save_file
from toy_blip2 import KINDS, QUERIES, assert_same_bits, one_line, save_toy, toy_pixels
from toy_language import VOCABULARY, toy_tokenizer, toy_transformers_model
from toy_run import toy_config, write_toy_data
from transformers import (
    AutoProcessor,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
)

import qformers
from qformers.convert.run import convert
from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import FrozenParts, LanguageConfig
from qformers.training.loop import train

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_theirs_to_ours_to_theirs_loses_no_bit(kind, dtype, tmp_path):
    save_toy(kind, tmp_path / "theirs", dtype)
    convert(tmp_path / "theirs", tmp_path / "ours", "qformers")
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    assert_same_bits(tmp_path / "theirs", tmp_path / "again")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again"))
    assert after == before
    first, second = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("theirs", "again"))
    assert first.num_query_tokens == second.num_query_tokens == QUERIES
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.image_processor.image_mean == second.image_processor.image_mean == (0.4, 0.5, 0.6)
    convert(tmp_path / "again", tmp_path / "ours_again", "qformers")
    assert_same_bits(tmp_path / "ours", tmp_path / "ours_again")
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "ours_again" / "config.json").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of ours from nothing, around EVA's ViT: their weights are what Hugging Face's classes cannot hold."""
    folder = tmp_path_factory.mktemp("runs")
    write_toy_data(folder)
    Blip2VisionModel(Blip2VisionConfig(**TOY_VISION)).save_pretrained(folder / "encoder")
    toy_transformers_model("gpt2").save_pretrained(folder / "gpt2")
    toy_tokenizer(folder / "gpt2")
    train(toy_config(folder, folder / "stage1", steps=4, precision="fp32"))
    language = LanguageConfig(path=str(folder / "gpt2"))
    settings = {"stage": 2, "start": str(folder / "stage1"), "language": language}
    train(toy_config(folder, folder / "stage2", steps=4, precision="fp32", **settings))
    return folder


@pytest.mark.parametrize("to", ["hf", "lavis"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_ours_to_theirs_to_ours_loses_no_bit(stage, to, runs, tmp_path):
    """Temperature, ITG head, text branch and the words before <image> was added come back."""
    there = tmp_path / ("there.pth" if to == "lavis" else "there")
    parts = FrozenParts(language_model=str(runs / "gpt2"), text_encoder=str(runs / "text"))
    convert(runs / stage, there, to)
    convert(there, tmp_path / "again", "qformers", parts)
    assert_same_bits(runs / stage / "model", tmp_path / "again")
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (runs / stage / "model", tmp_path / "again")
    )
    assert after == before
    ours, again = qformers.load(runs / stage), qformers.load(tmp_path / "again")
    picture = runs / "0.png"
    if stage == "stage1":
        assert torch.equal(ours.itc(picture, "a red square"), again.itc(picture, "a red square"))
    else:
        assert ours.caption(picture, "a photo") == again.caption(picture, "a photo")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "shard"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(how, tmp_path):
    mark, evil = tmp_path / "it_ran", {"model": {"query_tokens": Evil(tmp_path / "it_ran")}}
    source = tmp_path / "evil.pth"
    if how == "torch.save":
        torch.save(evil, source)
    elif how == "pickle":
        source.write_bytes(pickle.dumps(evil))
    else:
        source = tmp_path / "folder"
        save_toy("opt", source)
        (source / "model.safetensors").unlink()
        torch.save(evil["model"], source / "pytorch_model.bin")
    said = one_line(source)
    assert not mark.exists()
    assert str(source) in said
    if how != "pickle":
        assert "reading it could run code, so it is refused" in said and ".mkdir" in said
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "unpickled, the crafted object leaves a mark"


def test_a_truncated_file_and_a_missing_shard_are_named(tmp_path):
    save_toy("opt", tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    said = one_line(tmp_path / "one")
    assert str(file) in said and "damaged" in said
    save_toy("opt", tmp_path / "many", max_shard_size="60KB")
    shard = sorted((tmp_path / "many").glob("model-*.safetensors"))[1]
    shard.unlink()
    said = one_line(tmp_path / "many")
    assert str(shard) in said and "is missing" in said


def test_another_model_is_named(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TOY_VISION)).save_pretrained(tmp_path)
    assert "holds clip, no BLIP-2" in one_line(tmp_path)
    assert "there is no such file" in one_line(tmp_path / "absent.pth")
    assert "neither a folder nor a hub id" in one_line(tmp_path / "absent")
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "other.pth")
    assert "no BLIP-2 checkpoint of LAVIS" in one_line(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("qformer_config", {"hidden_size": 64}, "config.json says"),
        ("qformer_config", {"intermediate_size": 96}, "shape (64,), config.json says (96,)"),
        ("vision_config", {"num_hidden_layers": 3}, "lacks vision_model.encoder.layers.2"),
        ("vision_config", {"num_hidden_layers": 1}, "have no place in this model, first vision_model.encoder.layers.1"),
        ("text_config", {"ffn_dim": 96}, "its language model has shape"),
        ("qformer_config", {"hidden_act": "relu"}, "hidden_act relu"),
    ],
)
def test_a_config_that_disagrees_with_the_weights_is_refused(part, change, named, tmp_path):
    save_toy("opt", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config[part] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / "hf", tmp_path / "out", "qformers")
    assert named in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".unfinished*"))
    one_line(tmp_path / "hf")


def test_a_weight_that_is_missing_or_left_over_is_named(tmp_path):
    save_toy("instruct_t5", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file(state | {"surplus.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    assert "1 of its tensors have no place in this model, first surplus.weight" in one_line(tmp_path)
    name = "qformer.encoder.layer.0.output.dense.weight"
    save_file({key: tensor for key, tensor in state.items() if key != name}, file, metadata={"format": "pt"})
    assert f"lacks {name}" in one_line(tmp_path)


def test_a_folder_without_tokenizers_opens_and_says_so_when_words_are_asked_for(tmp_path):
    save_toy("opt", tmp_path / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / file).unlink()
    model = qformers.load(tmp_path / "hf")
    assert model.model.query(model.model.remember(model.model.vision_encoder(toy_pixels(1)))).shape == (1, QUERIES, 32)
    with pytest.raises(CheckpointError, match="lacks a tokenizer"):
        model.caption(torch.zeros(4, 4, 3).byte().numpy())
    with pytest.raises(CheckpointError, match="no ITC and ITM heads"):
        model.encode_text("a")
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    shutil.rmtree(tmp_path / "ours")
    assert qformers.load(tmp_path / "again").loaded.language is not None


def changed(folder: Path, **text: int) -> dict:
    """config.json without what older releases of transformers did not write, and `text` in its text_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("image_token_index")
    config["qformer_config"].pop("use_qformer_text_input", None)
    config["text_config"] |= text
    path.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("kind", ["opt", "t5", "instruct_llama", "retrieval"])
def test_a_folder_of_before_image_tokens_comes_back_with_one(kind, tmp_path):
    """Its language model may have no row to spare (Vicuna's 32001 words); back in our format it is as it was."""
    save_toy(kind, tmp_path / "old")
    changed(tmp_path / "old", vocab_size=VOCABULARY)
    file = tmp_path / "old" / "model.safetensors"
    state = load_file(file)
    for name, tensor in state.items():
        if name.startswith("language_model.") and tensor.shape[0] == VOCABULARY + 2:
            state[name] = tensor[:VOCABULARY].clone()
    save_file(state, file, metadata={"format": "pt"})
    convert(tmp_path / "old", tmp_path / "ours", "qformers")
    convert(tmp_path / "ours", tmp_path / "new", "hf")
    model, loading = getattr(transformers, KINDS[kind][0]).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert model.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")
    inputs = processor(images=[torch.zeros(3, 28, 28)], text=["a photo"], return_tensors="pt")
    if kind == "retrieval":
        assert model.eval()(**inputs).logits_per_image.shape == (1, 1)
    else:
        assert model.config.text_config.vocab_size == VOCABULARY + 1
        assert model.eval().generate(**inputs, max_new_tokens=3).shape[0] == 1
    convert(tmp_path / "new", tmp_path / "again", "qformers")
    assert_same_bits(tmp_path / "ours", tmp_path / "again")


def test_a_pad_token_of_minus_one_is_none(tmp_path):
    """As the first InstructBLIP folders of Vicuna have it."""
    save_toy("instruct_llama", tmp_path / "hf")
    changed(tmp_path / "hf", pad_token_id=-1)
    model = qformers.load(tmp_path / "hf")
    speaker = model.model.language_model
    assert speaker.pad_id == speaker.end_id
    assert len(model.caption([torch.zeros(4, 4, 3).byte().numpy()] * 2, ["a", "a photo of"], num_beams=2)) == 2


def test_files_that_are_json_and_not_what_they_should_be_are_named(tmp_path):
    save_toy("opt", tmp_path / "hf")
    save_file({"a": torch.ones(2)}, tmp_path / "hf" / "qformers.safetensors")
    assert "its metadata, our settings, is gone" in one_line(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("[]")
    assert "holds no settings by name" in one_line(tmp_path / "hf")


def test_a_lavis_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    save_toy("retrieval", tmp_path / "hf")

    def full(*_):
        (tmp_path / ".unfinished_out.pth").write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr("qformers.convert.lavis.torch.save", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        convert(tmp_path / "hf", tmp_path / "out.pth", "lavis")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("format", ["hf", "lavis"])
def test_a_readout_that_only_our_format_says_is_not_written_in_others(format, tmp_path):
    save_toy("retrieval", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "qformers")
    path = tmp_path / "ours" / "config.json"
    description = json.loads(path.read_text())
    description["model"]["text_readout"] = "mean"
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"reads the mean of a text's tokens .* keep it in our format"):
        convert(tmp_path / "ours", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
