"""LAVIS's layout: read with what it leaves out, written, and the same as its twin in Hugging Face's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_blip2 import TOY_VISION
from safetensors.torch import load_file
from toy_blip2 import BERT_VOCABULARY, QUERIES, assert_same_bits, one_line, save_toy, toy_bert, toy_pixels
from toy_language import toy_tokenizer, toy_transformers_model
from transformers import BertConfig, CLIPVisionConfig, CLIPVisionModel

import qformers
from qformers.cli import main
from qformers.convert.run import convert
from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import FrozenParts, LanguageConfig
from qformers.models.language import build_language_model


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


# LAVIS's names to Hugging Face's as its published conversion replaced them, apart from the key tables; in this order.
REPLACED = {
    "Qformer.bert.embeddings.LayerNorm": "qformer.embeddings.layernorm",
    "Qformer.bert.": "qformer.",
    "attention.self.": "attention.attention.",
    "llm_proj": "language_projection",
    "ln_vision": "vision_model.post_layernorm",
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.blocks": "vision_model.encoder.layers",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
    ".attn.qkv": ".self_attn.qkv",
    ".attn.proj": ".self_attn.projection",
}


def test_every_weight_has_the_name_that_lavis_gives_it(tmp_path):
    """A table that swaps two weights would undo its own mistake on the way back."""
    theirs = save_toy("instruct_llama", tmp_path / "hf").state_dict()
    convert(tmp_path / "hf", tmp_path / "lavis.pth", "lavis")
    state = torch.load(tmp_path / "lavis.pth", weights_only=True)["model"]
    assert torch.equal(state.pop("Qformer.bert.embeddings.position_ids"), torch.arange(512)[None])
    seen = set()
    for name, tensor in state.items():
        if name.endswith(("q_bias", "v_bias")):
            layer = name.split(".")[2]
            place = 0 if name.endswith("q_bias") else 2
            expected = theirs[f"vision_model.encoder.layers.{layer}.self_attn.qkv.bias"].chunk(3)[place]
        else:
            there = name
            for lavis, hugging_face in REPLACED.items():
                there = there.replace(lavis, hugging_face)
            expected = theirs[there]
            seen.add(there)
        assert torch.equal(tensor, expected), name
    left = {name for name in theirs.keys() - seen if not name.startswith("language_model.")}
    assert left == {f"vision_model.encoder.layers.{layer}.self_attn.qkv.bias" for layer in range(2)}


def test_stage_1_s_heads_have_the_names_that_lavis_gives_them(tmp_path):
    save_toy("retrieval", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "lavis.pth", "lavis")
    state = torch.load(tmp_path / "lavis.pth", weights_only=True)["model"]
    ours = qformers.load(tmp_path / "hf").model
    words = ours.qformer.text_embeddings.word.weight
    for name, tensor in {
        "temp": ours.temperature,
        "vision_proj.weight": ours.vision_projection.weight,
        "text_proj.weight": ours.text_projection.weight,
        "itm_head.bias": ours.itm_head.bias,
        "Qformer.bert.embeddings.word_embeddings.weight": words,
        "Qformer.bert.embeddings.position_embeddings.weight": ours.qformer.text_embeddings.position.weight,
        "Qformer.cls.predictions.transform.dense.weight": ours.itg_head.transform.weight,
        "Qformer.cls.predictions.transform.LayerNorm.weight": ours.itg_head.norm.weight,
        "Qformer.cls.predictions.bias": ours.itg_head.bias,
        "Qformer.cls.predictions.decoder.weight": words,
        "Qformer.cls.predictions.decoder.bias": ours.itg_head.bias,
    }.items():
        assert torch.equal(state[name], tensor), name
    assert state["temp"].dim() == 0
    state["Qformer.cls.predictions.decoder.weight"] = words + 1
    torch.save({"model": state}, tmp_path / "torn.pth")
    assert "differ, and must be one weight" in one_line(tmp_path / "torn.pth")


def test_a_head_that_was_grown_for_dec_has_the_bias_that_was_trained(tmp_path):
    """Under newer releases of transformers LAVIS leaves BERT's own bias behind, one word shorter and never read."""
    save_toy("retrieval", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "lavis.pth", "lavis")
    loaded = torch.load(tmp_path / "lavis.pth", weights_only=True)
    state, head = loaded["model"], "Qformer.cls.predictions"
    trained = torch.randn(BERT_VOCABULARY)
    grown = state | {f"{head}.bias": torch.zeros(BERT_VOCABULARY - 1), f"{head}.decoder.bias": trained}
    torch.save(loaded | {"model": grown}, tmp_path / "grown.pth")
    parts = {"text_encoder": str(bert_folder(tmp_path / "bert"))}
    assert torch.equal(qformers.load(tmp_path / "grown.pth", **parts).model.itg_head.bias, trained)
    torch.save(loaded | {"model": state | {f"{head}.decoder.bias": trained}}, tmp_path / "torn.pth")
    assert "differ, and must be one weight" in one_line(tmp_path / "torn.pth", **parts)


@pytest.mark.parametrize(
    ("kind", "remains"),
    [
        ("opt", ["opt_model.lm_head.weight"]),
        ("t5", ["t5_model.encoder.embed_tokens.weight", "t5_model.decoder.embed_tokens.weight"]),
        ("instruct_llama", ["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_remains_of_a_frozen_language_model_are_passed_over_and_a_trained_one_is_refused(kind, remains, tmp_path):
    """LAVIS takes frozen parameters out by name: buffers stay, and the second name of a shared weight."""
    theirs = save_toy(kind, tmp_path / "hf")
    theirs.language_model.save_pretrained(tmp_path / "language")
    as_lavis_wrote(tmp_path / "hf", tmp_path / "lavis.pth", with_encoder=True)
    parts = {
        "vision_encoder": str(tmp_path / "hf"),
        "language_model": str(tmp_path / "language"),
        "text_encoder": str(bert_folder(tmp_path / "bert")),
    }
    state = torch.load(tmp_path / "lavis.pth", weights_only=True)["model"]
    torch.save({"model": state | dict.fromkeys(remains, torch.ones(2))}, tmp_path / "remains.pth")
    ours, again = (qformers.load(tmp_path / name, **parts).model for name in ("lavis.pth", "remains.pth"))
    found = again.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in ours.state_dict().items())
    name = f"{remains[0].partition('.')[0]}.trained.weight"
    torch.save({"model": state | {name: torch.ones(2)}}, tmp_path / "trained.pth")
    assert f"have no place in this model, first {name}" in one_line(tmp_path / "trained.pth", **parts)


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


@pytest.mark.parametrize("part", ["text_encoder", "language_model"])
def test_code_that_a_named_folder_brings_does_not_run(part, tmp_path, monkeypatch):
    """Nobody is asked whether it may, which transformers does by itself."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    save_toy("opt" if part == "language_model" else "retrieval", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "lavis.pth", "lavis")
    parts = {"text_encoder": str(bert_folder(tmp_path / "bert"))}
    shutil.copytree(tmp_path / "bert", tmp_path / "own")
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    (tmp_path / "own" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "own" / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it_ran')!r})\n")
    parts |= {part: str(tmp_path / "own")}
    if part == "text_encoder":
        qformers.load(tmp_path / "lavis.pth", **parts)
    else:
        assert "holds no language model" in one_line(tmp_path / "lavis.pth", **parts)
        with pytest.raises(ConfigError, match="custom code"):
            build_language_model(LanguageConfig(path=str(tmp_path / "own")), 2, 1)
    assert not (tmp_path / "it_ran").exists()


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
