"""Conversions: bits survive every round trip, LAVIS's layout is read, and bad checkpoints get one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hf_blip2 import TOY_VISION
from safetensors.torch import load_file, save_file
from toy_blip2 import BERT_VOCABULARY, KINDS, QUERIES, save_toy, toy_bert, toy_pixels
from toy_language import toy_tokenizer, toy_transformers_model
from transformers import (
    AutoProcessor,
    BertConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import qformers
from qformers.cli import main
from qformers.convert.run import convert
from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import FrozenParts
from qformers.models.tensors import open_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a folder and of the folders in it."""
    found = {}
    for inside in (folder, folder / "language_model"):
        if inside.is_dir():
            tensors = open_tensors(inside)
            found |= {
                f"{inside.name}/{name}" if inside != folder else name: tensors.read(name) for name in tensors.described
            }
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and len(first) > 50
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


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
    from toy_run import toy_config, write_toy_data

    from qformers.models.config import LanguageConfig
    from qformers.training.loop import train

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


# ---- LAVIS's layout


def bert_folder(folder: Path) -> Path:
    """A BERT's tokenizer and config: where the number of a Q-Former's heads is written."""
    toy_bert(folder / "parts").save_pretrained(folder)
    BertConfig(hidden_size=32, num_attention_heads=4, vocab_size=BERT_VOCABULARY - 1).save_pretrained(folder)
    return folder


def as_lavis_wrote(source: Path, destination: Path, with_encoder: bool) -> None:
    """The twin of a Hugging Face folder in LAVIS's layout: frozen parts left out, training state beside the weights."""
    convert(source, destination.with_name("everything.pth"), "lavis")
    state = torch.load(destination.with_name("everything.pth"), weights_only=True)["model"]
    state = {name: tensor for name, tensor in state.items() if with_encoder or not name.startswith("visual_encoder.")}
    assert any(name.startswith("visual_encoder.") for name in state) == with_encoder
    torch.save(
        {"model": state, "optimizer": {"state": {0: torch.ones(3)}}, "config": {"run": {"lr": 1e-4}}, "epoch": 3},
        destination,
    )


@torch.no_grad()
@pytest.mark.parametrize("with_encoder", [False, True], ids=["frozen", "fine-tuned"])
@pytest.mark.parametrize("kind", ["retrieval", "opt", "t5", "llama", "instruct_llama", "instruct_t5"])
def test_lavis_layout_gives_the_outputs_of_its_twin(kind, with_encoder, tmp_path):
    theirs = save_toy(kind, tmp_path / "hf")
    with torch.no_grad():
        for layer in theirs.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[24:48] = 0  # EVA's attention has no bias of keys, and LAVIS no place for one
    theirs.save_pretrained(tmp_path / "hf")
    if kind != "retrieval":
        theirs.language_model.save_pretrained(tmp_path / "language")
        toy_tokenizer(tmp_path / "language", ends=kind.endswith("t5"), starts=not kind.endswith("t5"))
    as_lavis_wrote(tmp_path / "hf", tmp_path / "lavis.pth", with_encoder)
    parts = {
        "vision_encoder": str(tmp_path / "hf"),
        "language_model": str(tmp_path / "language") if kind != "retrieval" else None,
        "text_encoder": str(bert_folder(tmp_path / "bert")),
    }
    ours = qformers.load(tmp_path / "lavis.pth", **parts)
    twin = qformers.load(tmp_path / "hf")
    assert (ours.model.vision_norm.eps, twin.model.vision_norm.eps) == (1e-5, 1e-6)
    twin.model.vision_norm.eps = 1e-5
    patches = twin.model.vision_encoder(toy_pixels(3))
    assert torch.equal(ours.model.vision_encoder(toy_pixels(3)), patches)
    assert torch.equal(ours.model.query(ours.model.remember(patches)), twin.model.query(twin.model.remember(patches)))
    if kind == "retrieval":
        texts = ["a red square", "the dark line"]
        for of_texts in (lambda model: model.encode_text(texts).features, lambda model: model.model.temperature):
            assert torch.equal(of_texts(ours), of_texts(twin))
    else:
        pixels = [(toy_pixels(1)[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()]
        assert ours.caption(pixels, "a photo", num_beams=3) == twin.caption(pixels, "a photo", num_beams=3)
        assert ours.model.reads_instructions == kind.startswith("instruct")
    # Streamed into our format and opened again, it is the same model.
    convert(tmp_path / "lavis.pth", tmp_path / "ours", "qformers", FrozenParts(**parts))
    again, state = qformers.load(tmp_path / "ours").model.state_dict(), ours.model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_lavis_clip_vit_is_read_and_written(tmp_path):
    """ViT-L has OpenAI's layers: one matrix for queries, keys and values, a norm before the first layer."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOY_VISION)).save_pretrained(tmp_path / "clip")
    # A stage-1 model in LAVIS's layout without its encoder; CLIP's width is the toy EVA's.
    save_toy("retrieval", tmp_path / "hf")
    as_lavis_wrote(tmp_path / "hf", tmp_path / "frozen.pth", with_encoder=False)
    parts = FrozenParts(str(tmp_path / "clip"), None, str(bert_folder(tmp_path / "bert")))
    convert(tmp_path / "frozen.pth", tmp_path / "ours", "qformers", parts)
    with pytest.raises(ConfigError, match="clip_vision_model, and Hugging Face's BLIP-2 knows EVA's ViT alone"):
        convert(tmp_path / "ours", tmp_path / "no", "hf")
    convert(tmp_path / "ours", tmp_path / "whole.pth", "lavis")
    state = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    stored = load_file(tmp_path / "clip" / "model.safetensors")
    layer = "encoder.layers.0.self_attn.{}_proj.weight"
    prefix = next(name for name in stored if name.endswith(layer.format("q"))).removesuffix(layer.format("q"))
    fused = torch.cat([stored[prefix + layer.format(part)] for part in "qkv"])
    assert torch.equal(state["visual_encoder.transformer.resblocks.0.attn.in_proj_weight"], fused)
    assert "visual_encoder.transformer.resblocks.1.ln_1.weight" not in state, "the second-to-last layer is read"
    torch.save({"model": state}, tmp_path / "bare.pth")
    convert(tmp_path / "bare.pth", tmp_path / "again", "qformers", parts)
    assert_same_bits(tmp_path / "ours", tmp_path / "again")


def test_lavis_without_a_text_encoder_within_reach(tmp_path, caplog):
    """BERT's heads are 64 wide; of another width nothing is guessed. Without a tokenizer a picture can be read."""
    save_toy("retrieval", tmp_path / "hf")
    as_lavis_wrote(tmp_path / "hf", tmp_path / "lavis.pth", with_encoder=True)
    parts = {"vision_encoder": str(tmp_path / "hf"), "text_encoder": str(tmp_path / "absent")}
    said = one_line(tmp_path / "lavis.pth", **parts)
    assert "32 wide" in said and "name its text_encoder" in said
    model = qformers.load(tmp_path / "everything.pth", **parts)
    assert "has no tokenizer within reach" in caplog.text
    assert model.encode_image(toy_pixels(1)).features.shape == (1, QUERIES, 16)
    with pytest.raises(CheckpointError, match="has no tokenizer of the Q-Former's"):
        model.encode_text("a")


def test_a_bias_of_keys_is_left_out_and_changes_no_output(tmp_path, caplog):
    save_toy("retrieval", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "lavis.pth", "lavis")
    assert "bias of keys" in caplog.text
    convert(tmp_path / "lavis.pth", tmp_path / "again", "qformers", FrozenParts(text_encoder=str(tmp_path / "hf")))
    ours, again = (qformers.load(tmp_path / name).model.vision_encoder(toy_pixels(2)) for name in ("hf", "again"))
    assert not torch.equal(ours, again)
    torch.testing.assert_close(ours, again, atol=1e-4, rtol=1e-5)  # the scores of a query are shifted, and rounded anew


def test_lavis_without_its_frozen_models_names_what_it_needs(tmp_path, capsys):
    save_toy("opt", tmp_path / "hf")
    as_lavis_wrote(tmp_path / "hf", tmp_path / "lavis.pth", with_encoder=False)
    bert = ["--text_encoder", str(bert_folder(tmp_path / "bert"))]
    line = ["convert", str(tmp_path / "lavis.pth"), str(tmp_path / "out"), "--to", "qformers", *bert]
    assert main(line) == 1
    assert "leaves out its frozen image encoder, 24 wide: name it as vision_encoder" in capsys.readouterr().err
    assert main([*line, "--vision_encoder", str(tmp_path / "hf")]) == 1
    assert "has opt_proj and leaves out its frozen language model: name it as language_model" in capsys.readouterr().err
    language = toy_transformers_model("opt")
    language.save_pretrained(tmp_path / "opt")
    toy_tokenizer(tmp_path / "opt", starts=True)
    assert main([*line, "--vision_encoder", str(tmp_path / "hf"), "--language_model", str(tmp_path / "opt")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert main(line) == 1
    assert "is there already" in capsys.readouterr().err


# ---- what is refused


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def one_line(source: Path, **options) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        qformers.load(source, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


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
