"""Hugging Face's BLIP-2 classes at toy size, random, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers import randomise
from hf_blip2 import TOY_VISION
from toy_language import FAMILIES, SPECIAL_IDS, VOCABULARY, toy_tokenizer
from toy_run import WORDS
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    Blip2Processor,
    BlipImageProcessor,
    InstructBlipProcessor,
    PreTrainedModel,
)

import qformers
from qformers.errors import CheckpointError, ConfigError
from qformers.models.tensors import open_tensors

QUERIES = 4
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BERT_VOCABULARY = len(BERT_WORDS) + 1  # [DEC]
IMAGE_TOKEN = VOCABULARY  # the first id after the tokenizer's own, where a processor puts it
PX = TOY_VISION["image_size"]
QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "encoder_hidden_size": 24,
    "vocab_size": BERT_VOCABULARY,
}

# name → class, language model
KINDS = {
    "opt": ("Blip2ForConditionalGeneration", "opt"),
    "t5": ("Blip2ForConditionalGeneration", "t5"),
    "llama": ("Blip2ForConditionalGeneration", "llama"),
    "model": ("Blip2Model", "opt"),
    "retrieval": ("Blip2ForImageTextRetrieval", "opt"),
    "instruct_llama": ("InstructBlipForConditionalGeneration", "llama"),
    "instruct_t5": ("InstructBlipForConditionalGeneration", "t5"),
}
SPEAKING = [kind for kind in KINDS if kind != "retrieval"]


def toy_blip2(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the kind, with room for <image> among its words."""
    torch.manual_seed(seed)
    class_name, family = KINDS[kind]
    language, settings = FAMILIES[family]
    text_class = getattr(transformers, language).config_class
    model_class = getattr(transformers, class_name)
    qformer = QFORMER | ({"use_qformer_text_input": True} if kind == "retrieval" else {})
    config = model_class.config_class(
        vision_config=TOY_VISION,
        qformer_config=qformer,
        text_config=text_class(**{**settings, "vocab_size": VOCABULARY + 2}, **SPECIAL_IDS),
        num_query_tokens=QUERIES,
        image_token_index=BERT_VOCABULARY if kind == "retrieval" else IMAGE_TOKEN,
        **({"image_text_hidden_size": 16} if kind == "retrieval" else {}),
    )
    model = model_class(config).eval()
    randomise(model, std=0.25)
    return model


def save_toy(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> PreTrainedModel:
    """The model written by transformers with the processor of its class."""
    model = toy_blip2(kind).to(dtype)
    model.save_pretrained(folder, **options)
    toy_processor(kind, folder / "parts").save_pretrained(folder)
    return model


def toy_processor(kind: str, parts: Path):
    pictures = BlipImageProcessor(
        size={"height": PX, "width": PX}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    if kind == "retrieval":
        return Blip2Processor(pictures, toy_bert(parts), num_query_tokens=QUERIES)
    toy_tokenizer(parts, ends=KINDS[kind][1] == "t5", starts=KINDS[kind][1] != "t5")
    words = AutoTokenizer.from_pretrained(parts)
    if kind.startswith("instruct"):
        return InstructBlipProcessor(pictures, words, toy_bert(parts), num_query_tokens=QUERIES)
    return Blip2Processor(pictures, words, num_query_tokens=QUERIES)


def toy_bert(folder: Path):
    """A BERT tokenizer with [DEC], as LAVIS makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bert.txt").write_text("\n".join(BERT_WORDS) + "\n")
    tokenizer = BertTokenizer(str(folder / "bert.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def toy_pixels(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, PX, PX, generator=torch.Generator().manual_seed(rows))


def behind_the_picture(ids: torch.Tensor, token: int = IMAGE_TOKEN) -> torch.Tensor:
    """`ids` as transformers wants them: the places of the picture first."""
    return torch.cat([torch.full((len(ids), QUERIES), token), ids], dim=1)


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
    """The same names, dtypes and numbers."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and len(first) > 50
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def one_line(source: Path, **options) -> str:
    """What is said of a checkpoint that cannot be opened: one line."""
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        qformers.load(source, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)
