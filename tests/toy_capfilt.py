"""CapFilt at toy size: pictures with web captions, a stage-1 and a stage-2 run, and Hugging Face's models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import toy_config, write_toy_data
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from qformers.capfilt.config import OutputConfig, RankingConfig, SamplingConfig, WorkConfig
from qformers.capfilt.run import clean_captions
from qformers.capfilt.statistics import Statistics
from qformers.data.config import SourceConfig
from qformers.models.config import LanguageConfig
from qformers.training.loop import train

SAMPLING = SamplingConfig(captions=4, max_new_tokens=6, min_new_tokens=2)
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_VISION = {**_LAYERS, "image_size": 28, "patch_size": 14}
_TEXT = {**_LAYERS, "vocab_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def write_toy_capfilt(folder: Path, pictures: int = 24) -> None:
    """`write_toy_data`, and `stage1` and `stage2` runs of a few steps that share their image encoder."""
    write_toy_data(folder, pictures)
    train(toy_config(folder, folder / "stage1", steps=4, precision="fp32"))
    toy_transformers_model("gpt2").save_pretrained(folder / "gpt2")
    toy_tokenizer(folder / "gpt2")
    speaker = {"stage": 2, "start": str(folder / "stage1"), "language": LanguageConfig(path=str(folder / "gpt2"))}
    train(toy_config(folder, folder / "stage2", steps=4, precision="fp32", **speaker))


def clean(
    data: Path,
    folder: Path,
    source: str = "pairs.jsonl",
    shard_format: Literal["jsonl", "webdataset"] = "jsonl",
    **settings: Any,
) -> Statistics:
    """`clean_captions` of the toy data in shards of 8 pictures, parts of 3."""
    chosen = {
        "captioner": str(data / "stage2"),
        "ranker": str(data / "stage1"),
        "output": OutputConfig(str(folder), shard_format, shard_pictures=8),
        "sampling": SAMPLING,
        "ranking": RankingConfig(),
        "work": WorkConfig(batch_size=3, threads=1, devices=["cpu"]),
        **settings,
    }
    return clean_captions(SourceConfig(str(data / source)), **chosen)


def files_of(output: Path) -> dict[str, bytes]:
    """What a run's output is made of, by name: all but its report, its statistics and its settings."""
    found = [*output.glob("captions-*"), *(output / "accounts").glob("*")]
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(found)}


def same_captions(one: Path, other: Path) -> bool:
    """Whether two runs wrote and kept the same captions, with scores that differ by rounding at most."""
    for left, right in zip(rows_of(one, "accounts/*"), rows_of(other, "accounts/*"), strict=True):
        for a, b in zip(left.pop("candidates"), right.pop("candidates"), strict=True):
            scores = a.pop("score"), b.pop("score")
            if a != b or (scores[0] is None) != (scores[1] is None) or abs((scores[0] or 0) - (scores[1] or 0)) > 2e-4:
                return False
        if left != right:
            return False
    return True


def rows_of(output: Path, pattern: str = "captions-*.jsonl") -> Iterator[dict]:
    """Lines of the shards."""
    for file in sorted(output.glob(pattern)):
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def save_toy_captioner(kind: str, folder: Path) -> PreTrainedModel:
    """An image-to-text model of Hugging Face's with random weights, its image processor and its tokenizer."""
    torch.manual_seed(0)
    if kind == "blip":
        text = {**_TEXT, **_TOKENS, "sep_token_id": 2, "encoder_hidden_size": 32, "projection_dim": 16}
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_VISION))
    elif kind == "git":
        model = GitForCausalLM(GitConfig(vision_config=_VISION, **_TEXT, **_TOKENS))
    else:
        decoder = GPT2Config(vocab_size=24, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True, **_TOKENS)
        model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**_VISION)), decoder=GPT2LMHeadModel(decoder))
        for settings in (model.config, model.generation_config):
            settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = 1, 0, 2
    return _save(model, folder)


def save_toy_ranker(kind: str, folder: Path) -> PreTrainedModel:
    """A dual encoder of Hugging Face's with random weights, its image processor and its tokenizer."""
    torch.manual_seed(0)
    if kind == "clip":
        text, vision = {**_TEXT, **_TOKENS, "projection_dim": 16}, {**_VISION, "projection_dim": 16}
        model: PreTrainedModel = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config={**_TEXT, **_TOKENS}, vision_config=_VISION))
    return _save(model, folder)


@torch.no_grad()
def _save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    # Fresh weights are so small that every picture gets the same words.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.25)
    model.eval().save_pretrained(folder)
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder)
    toy_tokenizer(folder, ends=True)
    return model
