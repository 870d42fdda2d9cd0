"""Language models of every family at toy size, random, and a word-level tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from helpers import GivenPatches, randomise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qformers.models.config import ModelConfig
from qformers.models.language import LanguageModel
from qformers.models.presets import build_stage2
from qformers.models.stage2 import Stage2Model

WORDS = [
    "a",
    "photo",
    "of",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "fish",
    "tree",
    "house",
    "car",
    "on",
    "in",
    "and",
    "the",
    "sits",
    "runs",
    "flies",
]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = len(SPECIALS) + len(WORDS)
PAD, START, END = 0, 1, 2
DIM = 32

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict]] = {
    "opt": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": DIM}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": DIM, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": DIM, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": PAD},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": DIM, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "max_position_embeddings": 64, "decoder_start_token_id": END, "forced_eos_token_id": None,
         "scale_embedding": True},
    ),
}  # fmt: skip


def toy_transformers_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Hugging Face's own model of the family, with weights large enough that its answers depend on what it reads."""
    torch.manual_seed(seed)
    class_name, settings = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings, **SPECIAL_IDS)).eval()
    randomise(model, std=0.25)
    model.generation_config.eos_token_id = END
    return model


def toy_language_model(family: str, seed: int = 0) -> LanguageModel:
    return LanguageModel(toy_transformers_model(family, seed), END, PAD)


def toy_tokenizer(folder: Path, *, starts: bool = False, ends: bool = False, pads: bool = True) -> None:
    """Write a word-level tokenizer that puts <s> before a text, or </s> behind it, or has no pad token."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIALS, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    single = " ".join(["<s>"] * starts + ["$A"] + ["</s>"] * ends)
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", START), ("</s>", END)])
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pads:
        specials["pad_token"] = "<pad>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)


def toy_stage2(family: str, vision_dim: int = 24, seed: int = 0) -> Stage2Model:
    """A stage-2 model of the `tiny` preset around a toy language model, without dropout."""
    config = ModelConfig(
        preset="tiny", start_from_text_encoder=False, num_queries=4, dropout=0.0, attention_dropout=0.0
    )
    torch.manual_seed(seed)
    model = build_stage2(config, 50, GivenPatches(vision_dim), toy_language_model(family, seed))
    for part in (model.vision_norm, model.qformer, model.language_projection):
        randomise(part)
    return model


def toy_prompts(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of word ids padded on the right, and the mask of real tokens."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows]).reshape(len(rows), length)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(length)[None] < lengths[:, None]
