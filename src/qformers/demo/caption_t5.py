"""The demo's encoder-decoder language model: a small T5 that learns the training captions first, then is frozen.

No package carries a T5 that speaks, so the demo makes one: its encoder reads a caption with its words shuffled and some
missing, its decoder says the caption. What later reads visual prompts in place of those words stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from qformers.data.batch import IGNORED_LABEL
from qformers.data.text import clean_caption, pad
from qformers.demo.assets import atomic_folder
from qformers.models.vision import quiet_loading
from qformers.precision import autocast

BATCH, PEAK_LR, WARMUP = 64, 2e-3, 50
VOCABULARY = 4000
MISSING_WORDS = 0.2
LOGGED_STEPS = 100

logger = logging.getLogger(__name__)


def caption_t5_folder(captions: Sequence[str], tokenizer_kind: Path, folder: Path, seed: int, steps: int) -> Path:
    """Train the T5 on `captions` unless `folder` holds it already; a Hugging Face folder with its tokenizer.

    Args:
        tokenizer_kind: a BERT's folder. Of its kind, WordPiece whose [SEP] ends a text, is the tokenizer; its words are
            those of `captions`, a tenth as many: what they cost in the vocabulary head is most of a small T5's work.
    """
    if folder.is_dir():
        return folder
    torch.manual_seed(seed)
    texts = sorted({clean_caption(caption) for caption in captions} - {""})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_kind, eos_token="[SEP]")
    tokenizer = tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    model = _new_model(tokenizer)
    _train(model, tokenizer, texts, np.random.default_rng(seed), steps)
    with atomic_folder(folder) as partial, quiet_loading():
        model.bfloat16().save_pretrained(partial)  # as SmolLM2 is stored: read so where that is fast
        tokenizer.save_pretrained(partial)
    return folder


def _new_model(tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 768,
        "num_layers": 3,
        "num_heads": 8,
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return T5ForConditionalGeneration(T5Config(**settings))


def _train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    generator: np.random.Generator,
    steps: int,
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    model.train()
    for step in range(1, steps + 1):
        chosen = [texts[row] for row in generator.integers(len(texts), size=BATCH)]
        read, mask = _ids([_scrambled(text, generator) for text in chosen], tokenizer)
        said, said_mask = _ids(chosen, tokenizer)
        with autocast("cpu"):
            loss = model(
                input_ids=read, attention_mask=mask.long(), labels=said.masked_fill(~said_mask, IGNORED_LABEL)
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % LOGGED_STEPS == 0:
            logger.info("caption T5: step %d/%d, loss %.3f", step, steps, loss.item())
    model.eval()


def _scrambled(text: str, generator: np.random.Generator) -> str:
    """The words of `text` in another order, some of them left out."""
    words = [word for word in text.split() if generator.random() >= MISSING_WORDS]
    return " ".join(words[place] for place in generator.permutation(len(words)))


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    return pad(rows, cast(int, tokenizer.pad_token_id))
