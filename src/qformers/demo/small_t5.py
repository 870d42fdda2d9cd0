"""The demo's encoder-decoder language models: small T5s that learn from text first, then are frozen.

No package carries a T5 that speaks, so they are made here. The captioner's encoder reads a caption with its words
shuffled and some missing, its decoder says the caption. The answerer's reads captions of a scene and a question, its
decoder says the answer. What later reads visual prompts in place of those captions stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from qformers.data.batch import IGNORED_LABEL
from qformers.data.text import clean_caption, pad
from qformers.demo.assets import atomic_folder
from qformers.demo.questions import ONE_THING, ask_of, asked_caption, draw_things, thing_captions
from qformers.models.config import LanguageConfig
from qformers.models.vision import quiet_loading
from qformers.precision import autocast

BATCH, PEAK_LR, WARMUP = 64, 2e-3, 50
VOCABULARY = 4000
HEADS = 8
MISSING_WORDS = 0.2
LOGGED_STEPS = 100

logger = logging.getLogger(__name__)

Draw = Callable[[np.random.Generator], tuple[str, str]]
"""A text to read, and what to say to it."""


def caption_t5_folder(captions: Sequence[str], tokenizer_kind: Path, folder: Path, seed: int, steps: int) -> Path:
    """The captioner, trained on `captions`; as `small_t5_folder`."""
    texts = sorted({clean_caption(caption) for caption in captions} - {""})

    def draw(generator: np.random.Generator) -> tuple[str, str]:
        text = texts[int(generator.integers(len(texts)))]
        return _scrambled(text, generator), text

    return small_t5_folder(draw, texts, tokenizer_kind, folder, seed, steps)


def scene_t5_folder(
    names: Sequence[str], kinds: Sequence[str], tokenizer_kind: Path, folder: Path, seed: int, steps: int
) -> Path:
    """The answerer of these kinds of questions about scenes of things with these names; as `small_t5_folder`.

    It reads `scene_example`s, drawn anew each time. A smaller width will do: it knows some hundred words.
    """

    def draw(generator: np.random.Generator) -> tuple[str, str]:
        return scene_example(names, kinds, generator)

    generator = np.random.default_rng(seed)
    texts = [text for _ in range(2000) for text in draw(generator)]
    return small_t5_folder(draw, texts, tokenizer_kind, folder, seed, steps, width=128)


def scene_example(names: Sequence[str], kinds: Sequence[str], generator: np.random.Generator) -> tuple[str, str]:
    """Captions of a scene's things in any order, then a question of one of the kinds, as a language model is asked it;
    and the answer.

    Where the question is about one thing, its caption stands among none to three of the others: from one caption a T5
    learns which words answer which question, and only then from more which caption to look for.
    """
    things = draw_things(list(names), generator)
    asked = [question for question in ask_of(things, list(names), generator) if question[0] in kinds]
    kind, question, answer = asked[int(generator.integers(len(asked)))]
    captions = thing_captions(things)
    if kind in ONE_THING:
        about = asked_caption(question, captions)
        others = generator.permutation([caption for caption in captions if caption != about])
        captions = [about, *others[: int(generator.integers(len(captions)))]]
    said = generator.permutation(captions)
    return f"{', '.join(said)}. {LanguageConfig.question_template.format(question)}", answer


def small_t5_folder(
    draw: Draw, texts: Sequence[str], tokenizer_kind: Path, folder: Path, seed: int, steps: int, width: int = 256
) -> Path:
    """A T5 trained on what `draw` gives, unless `folder` holds it already; a Hugging Face folder with its tokenizer.

    Args:
        texts: whose words the tokenizer knows.
        tokenizer_kind: a BERT's folder. Of its kind, WordPiece whose [SEP] ends a text, is the tokenizer; its words are
            those of `texts`, a tenth as many: what they cost in the vocabulary head is most of a small T5's work.
    """
    if folder.is_dir():
        return folder
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_kind, eos_token="[SEP]")
    tokenizer = tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    model = _new_model(tokenizer, width)
    _train(model, tokenizer, draw, np.random.default_rng(seed), steps)
    with atomic_folder(folder) as partial, quiet_loading():
        model.bfloat16().save_pretrained(partial)  # as SmolLM2 is stored: read so where that is fast
        tokenizer.save_pretrained(partial)
    return folder


def _new_model(tokenizer: PreTrainedTokenizerBase, width: int) -> T5ForConditionalGeneration:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": width // HEADS,
        "d_ff": 3 * width,
        "num_layers": 3,
        "num_heads": HEADS,
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return T5ForConditionalGeneration(T5Config(**settings))


def _train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    draw: Draw,
    generator: np.random.Generator,
    steps: int,
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    model.train()
    for step in range(1, steps + 1):
        to_read, to_say = zip(*(draw(generator) for _ in range(BATCH)), strict=True)
        read, mask = _ids(list(to_read), tokenizer)
        said, said_mask = _ids(list(to_say), tokenizer)
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
            logger.info("T5: step %d/%d, loss %.3f", step, steps, loss.item())
    model.eval()


def _scrambled(text: str, generator: np.random.Generator) -> str:
    """The words of `text` in another order, some of them left out."""
    words = [word for word in text.split() if generator.random() >= MISSING_WORDS]
    return " ".join(words[place] for place in generator.permutation(len(words)))


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    return pad(rows, cast(int, tokenizer.pad_token_id))
