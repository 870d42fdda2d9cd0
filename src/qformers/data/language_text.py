"""Captions as a language model reads and says them: its own tokenizer, a prompt, and what it is to say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextIteratorStreamer

from qformers.data.batch import IGNORED_LABEL
from qformers.data.text import pad
from qformers.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class LanguageTokenizer:
    """A language model's tokenizer, and the layout of what the model reads and says.

    Decoder-only: `start prompt caption end`, where `start` is what the family puts before a text (OPT's </s>,
    Llama's <s>, nothing for GPT-2), and the labels are the caption and the end.
    Encoder-decoder, prefix language modelling (BLIP-2, section 3.2): the caption is split in two between words; the
    encoder reads the prompt and the first part, the labels are the second part and the end. Training draws the split,
    the first part may be empty; otherwise it is in the middle. With `split_captions` False the first part is empty.

    A target of more than `max_tokens` tokens, the end included, is cut and counted in `cut_captions`.

    Raises:
        ConfigError: the tokenizer has no token that ends a text, or `end_token` is not one token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool,
        prompt: str = "",
        max_tokens: int = 32,
        end_token: str | None = None,
        split_captions: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.prompt = prompt.strip()
        self.max_tokens = max_tokens
        self.split_captions = split_captions
        self.cut_captions = 0
        bare, whole = self._ids("a"), tokenizer("a")["input_ids"]
        first = whole.index(bare[0])
        self._before, self._after = whole[:first], whole[first + len(bare) :]
        if tokenizer.eos_token_id is None and end_token is None:
            raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no end token: set language.end_token")
        self.end_id = int(cast(int, tokenizer.eos_token_id)) if end_token is None else self._one_id(end_token)
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else int(cast(int, tokenizer.pad_token_id))
        if tokenizer.pad_token_id is None:
            # Padding is masked in attention and in the loss, so any token will do.
            logger.info(
                "tokenizer %r has no pad token: its end token pads, which changes nothing", tokenizer.name_or_path
            )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        is_encoder_decoder: bool,
        prompt: str = "",
        max_tokens: int = 32,
        end_token: str | None = None,
        split_captions: bool = True,
    ) -> LanguageTokenizer:
        """The tokenizer of a folder or a hub id. Raises DataError where there is none."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder_or_hub_id), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{folder_or_hub_id}: no tokenizer could be loaded: {reason}") from error
        return cls(tokenizer, is_encoder_decoder, prompt, max_tokens, end_token, split_captions)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`."""
        self._tokenizer.save_pretrained(str(folder))

    def encode_example(
        self, caption: str, generator: np.random.Generator | None
    ) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " label_tokens"]]:
        """`input_ids` and `labels` of one caption, as the class says."""
        if self.is_encoder_decoder:
            first, second = self._split(caption, generator)
            read = " ".join(filter(None, (self.prompt, first)))
            return torch.tensor(self._before + self._ids(read) + self._after), torch.tensor(
                self._before + self._cut(self._ids(second), len(self._before))
            )
        return self._continued(self.prompt, caption)

    def encode_answer(self, prompt: str, answer: str) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " label_tokens"]]:
        """`input_ids` and `labels` of an answer to `prompt`: what `encode_prompts` gives is all that is read before."""
        prompt = prompt.strip()
        if self.is_encoder_decoder:
            target = self._before + self._cut(self._ids(answer), len(self._before))
            return torch.tensor(self._before + self._ids(prompt) + self._after), torch.tensor(target)
        return self._continued(prompt, answer)

    def _continued(self, prompt: str, target: str) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " label_tokens"]]:
        read = self._before + self._ids(prompt)
        said = self._cut(self._continuation(prompt, target))
        return torch.tensor(read + said), torch.tensor([IGNORED_LABEL] * len(read) + said)

    def encode_prompts(self, prompts: list[str]) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """What a model that is to go on after each prompt reads, padded on the right; an empty one is allowed."""
        after = self._after if self.is_encoder_decoder else []
        rows = [torch.tensor(self._before + self._ids(text.strip()) + after, dtype=torch.long) for text in prompts]
        return pad(rows, self.pad_id)

    def decode(self, ids: Int[Tensor, "rows tokens"]) -> list[str]:
        """Generated ids as text, up to the end token, special tokens left out."""
        texts = []
        for row in ids.tolist():
            said = row[: row.index(self.end_id)] if self.end_id in row else row
            texts.append(str(self._tokenizer.decode(said, skip_special_tokens=True)).strip())
        return texts

    def streamer(self) -> TextStreamer:
        """A queue of text for one row that is being generated, special tokens and the end token left out."""
        # What it is told to skip is the decoder's start token, or nothing at all.
        return TextStreamer(self._tokenizer, self.end_id)

    def _split(self, caption: str, generator: np.random.Generator | None) -> tuple[str, str]:
        words = caption.split()
        if not self.split_captions or not words:
            return "", caption
        place = len(words) // 2 if generator is None else int(generator.integers(len(words)))
        return " ".join(words[:place]), " ".join(words[place:])

    def _continuation(self, prompt: str, text: str) -> list[int]:
        """The text's ids as they follow the prompt: a word's ids differ with the space before it."""
        if not prompt or not text:
            return self._ids(text)
        before, whole = self._ids(prompt), self._ids(f"{prompt} {text}")
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._ids(f" {text}")

    def _cut(self, ids: list[int], reserved: int = 0) -> list[int]:
        room = self.max_tokens - 1 - reserved
        if len(ids) > room:
            self.cut_captions += 1
        return [*ids[:room], self.end_id]

    def _ids(self, text: str) -> list[int]:
        # verbose=False: transformers would warn that a long text cannot be run; the limits here are ours.
        # Captions hold no special tokens: "</s>" typed by a user is read as the pieces it is spelled with.
        if not text:
            return []
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _one_id(self, token: str) -> int:
        ids = self._tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(f"language.end_token {token!r} is {len(ids)} tokens of this tokenizer: it must be one")
        return ids[0]


class TextStreamer(TextIteratorStreamer):
    """Transformers' queue of text, which also leaves out an end token that is an ordinary word.

    Once `abandoned` it refuses the next token, which ends the generation that feeds it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_id: int) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.end_id = end_id
        self.abandoned = False

    def put(self, value: Tensor) -> None:
        if self.abandoned:
            raise RuntimeError("nobody reads this text any more")
        if self.next_tokens_are_prompt or value.flatten().tolist() != [self.end_id]:
            super().put(value)
