"""Every official architecture at full size on the meta device: each name and shape maps both ways, none is left."""

from __future__ import annotations

from dataclasses import asdict, replace

import lavis_layout
import pytest
import torch
import transformers
from transformers import (
    Blip2Config,
    CLIPVisionConfig,
    InstructBlipConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from qformers.convert.checkpoint import own_weights, skeleton
from qformers.convert.huggingface import CLASSES, description_of, read_huggingface
from qformers.convert.keys import LANGUAGE_MODEL, LAVIS_POSITIONS, LAVIS_TWINS, lavis_table
from qformers.convert.rename import to_ours, to_theirs
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.presets import PRESETS, VISION_NORM_EPS
from qformers.models.tensors import in_memory

# The published values of the four language models and of Vicuna-7B (32000 words, [PAD] and <image>).
OPT_27B = OPTConfig(vocab_size=50304, hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
                    word_embed_proj_dim=2560, eos_token_id=50118)  # fmt: skip
OPT_67B = OPTConfig(vocab_size=50304, hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32,
                    word_embed_proj_dim=4096, eos_token_id=50118)  # fmt: skip
FLAN = {"vocab_size": 32128, "d_kv": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "decoder_start_token_id": 0}  # fmt: skip
FLAN_T5_XL = T5Config(**FLAN, d_model=2048, d_ff=5120, num_heads=32)
FLAN_T5_XXL = T5Config(**FLAN, d_model=4096, d_ff=10240, num_heads=64)
VICUNA_7B = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32)  # fmt: skip
INSTRUCT = {"qformer_config": {"vocab_size": 30523}}

OFFICIAL = {
    "blip2-opt-2.7b": ("Blip2ForConditionalGeneration", Blip2Config(text_config=OPT_27B)),
    "blip2-opt-6.7b": ("Blip2ForConditionalGeneration", Blip2Config(text_config=OPT_67B)),
    "blip2-opt-2.7b-coco": (
        "Blip2ForConditionalGeneration",
        Blip2Config(text_config=OPT_27B, vision_config={"image_size": 364}),
    ),
    "blip2-flan-t5-xl": ("Blip2ForConditionalGeneration", Blip2Config(text_config=FLAN_T5_XL)),
    "blip2-flan-t5-xxl": ("Blip2ForConditionalGeneration", Blip2Config(text_config=FLAN_T5_XXL)),
    "blip2-model": ("Blip2Model", Blip2Config(text_config=OPT_27B)),
    "blip2-itm-vit-g": (
        "Blip2ForImageTextRetrieval",
        Blip2Config(qformer_config={"vocab_size": 30523, "use_qformer_text_input": True}),
    ),
    "instructblip-vicuna-7b": (
        "InstructBlipForConditionalGeneration",
        InstructBlipConfig(text_config=VICUNA_7B, **INSTRUCT),
    ),
    "instructblip-flan-t5-xl": (
        "InstructBlipForConditionalGeneration",
        InstructBlipConfig(text_config=FLAN_T5_XL, **INSTRUCT),
    ),
}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_architectures_of_hugging_face(name, tmp_path, monkeypatch):
    architecture, config = OFFICIAL[name]
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)._from_config(config)
    stored = shapes(theirs.state_dict())
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("qformers.convert.huggingface.open_tensors", lambda folder: in_memory(theirs.state_dict()))
    checkpoint = read_huggingface(tmp_path, name)

    # One for one into ours: no name of theirs is unread (it would raise), none of ours unfilled.
    needed = own_weights(skeleton(checkpoint.description, checkpoint.language and checkpoint.language.config, name))
    assert shapes(checkpoint.tensors.described) == shapes(needed)
    layers = {key.split(".")[4] for key in needed if key.startswith("vision_encoder.body.encoder.layers.")}
    assert len(layers) == 39, "one of ViT-g's 40 layers is left out, and no other"
    # And back: every name and shape of theirs again.
    again, extra = to_theirs(checkpoint.tensors, CLASSES[architecture])
    found = shapes(again.described)
    if checkpoint.language is not None:
        found |= shapes(checkpoint.language.tensors.with_prefix(LANGUAGE_MODEL).described)
    assert found == stored
    lost = {key.split(".")[0] for key in extra.described}
    assert lost == ({"itg_head", "temperature"} if architecture == "Blip2ForImageTextRetrieval" else set())


LAVIS = {
    "pretrain": ("eva", None, None, 257),
    "pretrain_vitL": ("clip", None, None, 257),
    "coco": ("eva", None, None, 677),
    "pretrain_opt2.7b": ("eva", "opt_proj", OPT_27B, 257),
    "pretrain_opt6.7b": ("eva", "opt_proj", OPT_67B, 257),
    "caption_coco_opt2.7b": ("eva", "opt_proj", OPT_27B, 677),
    "pretrain_flant5xl": ("eva", "t5_proj", FLAN_T5_XL, 257),
    "pretrain_flant5xl_vitL": ("clip", "t5_proj", FLAN_T5_XL, 257),
    "pretrain_flant5xxl": ("eva", "t5_proj", FLAN_T5_XXL, 257),
    "instruct_vicuna7b": ("eva", "llm_proj", VICUNA_7B, 257),
    "instruct_flant5xl": ("eva", "t5_proj", FLAN_T5_XL, 257),
}


def lavis_shapes(name: str) -> lavis_layout.Shapes:
    """What LAVIS's own `state_dict` of the model holds, with its image encoder and without its language model."""
    family, projection, language, positions = LAVIS[name]
    layout = lavis_layout.eva_vit if family == "eva" else lavis_layout.clip_vit
    text = projection is None or name.startswith("instruct")
    found = layout(positions=positions) | lavis_layout.qformer(1408 if family == "eva" else 1024, text)
    if projection is None:
        return found | lavis_layout.stage1_heads()
    return found | lavis_layout.linear(projection, 768, language.hidden_size)


@pytest.mark.parametrize("name", LAVIS)
def test_official_architectures_of_lavis(name):
    family, projection, language, positions = LAVIS[name]
    stored = lavis_shapes(name)
    text = projection is None or name.startswith("instruct")
    image_px = {257: 224, 677: 364}[positions]
    if family == "eva":
        vision = Blip2Config(vision_config={"image_size": image_px}).vision_config
    else:
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
        vision = CLIPVisionConfig(num_hidden_layers=23, **sizes)
    spoken = None
    if language is not None:
        spoken = asdict(LanguageConfig(path="", qformer_reads="prompt" if text else "nothing")) | {
            "end_id": 2,
            "pad_id": 1,
        }
    description = description_of(
        ModelConfig(),
        replace(PRESETS["blip2"], has_text=text),
        30523 * text,
        {
            "config": vision.to_dict(),
            "layer": vision.num_hidden_layers,
            "image_px": image_px,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "dtype": "float16",
        },
        VISION_NORM_EPS,
        spoken,
    )
    needed = own_weights(skeleton(description, language and language.to_dict(), name))
    table = lavis_table(family, projection)
    read = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
    once = {key: meta for key, meta in read.items() if key not in (*LAVIS_TWINS, LAVIS_POSITIONS)}
    ours = to_ours(in_memory(once), table, needed, name)
    assert shapes(ours.described) == shapes(needed)
    again, extra = to_theirs(ours, table)
    assert not extra.described
    twins = {LAVIS_POSITIONS: (1, 512)}
    twins |= {twin: stored[key] for twin, key in LAVIS_TWINS.items() if projection is None}
    assert shapes(again.described) | twins == stored
