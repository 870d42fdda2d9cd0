"""Captions → token ids: the authors' cleaning rule, BERT WordPiece, and [DEC] as the last id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qformers.errors import ConfigError, DataError

_DEC = "[DEC]"
_IMAGE = "<image>"
_PUNCTUATION = re.compile(r"""[.!"()*#:;~]""")
_MAX_WORDS = 50


def clean_caption(text: str) -> str:
    """Lower case, `.!"()*#:;~` to spaces, spaces collapsed, the first 50 words (PAPER: section 7, LAVIS)."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split()[:_MAX_WORDS])


class CaptionTokenizer:
    """A BERT WordPiece tokenizer with [DEC], the token that image-grounded text starts with, added last.

    A caption of more than `max_tokens` tokens, [CLS] and [SEP] included, is cut (keeping [SEP]) and counted
    in `cut_captions` (of this process), or refused with DataError, as `too_long` says.
    Captions hold no special tokens: "[SEP]" typed by a user is read as the three pieces it is spelled with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = 32,
        too_long: Literal["cut", "error"] = "cut",
    ) -> None:
        if max_tokens < 3:
            raise ConfigError(f"max_tokens is {max_tokens}: [CLS], one token and [SEP] need 3")
        specials = [getattr(tokenizer, f"{name}_token") for name in ("cls", "sep", "pad")]
        if None in specials:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r} has no [CLS], [SEP] or [PAD]: give a BERT one, "
                "for example google-bert/bert-base-uncased"
            )
        tokenizer.add_special_tokens({"bos_token": _DEC})
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        # Hugging Face's processors add a token that stands for the picture. No text holds it, and no embedding is its.
        self.vocab_size = len(vocabulary) - (_IMAGE in vocabulary)
        self.cls_id, self.sep_id, self.pad_id = (vocabulary[token] for token in specials)
        self.dec_id = vocabulary[_DEC]
        if self.dec_id != self.vocab_size - 1:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r} has {_DEC} at {self.dec_id} of {self.vocab_size} ids: "
                "it must be the last, where the word embeddings expect it"
            )
        self.max_tokens = max_tokens
        self.too_long = too_long
        self.cut_captions = 0
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, max_tokens: int = 32, too_long: Literal["cut", "error"] = "cut"
    ) -> CaptionTokenizer:
        """The tokenizer of a folder or a hub id. Raises DataError where there is none."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder_or_hub_id), trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{folder_or_hub_id}: no tokenizer could be loaded: {reason}") from error
        return cls(tokenizer, max_tokens, too_long)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer, with [DEC], into `folder`."""
        self._tokenizer.save_pretrained(str(folder))

    def encode(self, texts: list[str]) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """`[CLS] … [SEP]` of each text, padded right to the longest of the call; the mask of real tokens."""
        return pad([torch.tensor(self.encode_one(text)) for text in texts], self.pad_id)

    def encode_one(self, text: str) -> list[int]:
        """`[CLS] … [SEP]` of one text, unpadded, at most `max_tokens` ids."""
        ids = self._ids(text)
        if len(ids) <= self.max_tokens:
            return ids
        if self.too_long == "error":
            raise self._cut("caption", text, len(ids))
        self.cut_captions += 1
        return [*ids[: self.max_tokens - 1], self.sep_id]

    def encode_example(
        self, caption: str, generator: np.random.Generator | None
    ) -> tuple[Int[Tensor, " tokens"], None]:
        """`encode_one` as stage 1 trains on it: the objectives find their labels in the ids."""
        return torch.tensor(self.encode_one(caption)), None

    def is_too_long(self, text: str) -> bool:
        """Whether `text` has more tokens than the limit."""
        return len(self._ids(text)) > self.max_tokens

    def check_length(self, text: str) -> None:
        """Raise DataError if `text` is too long, whatever `too_long` says of captions."""
        if (length := len(self._ids(text))) > self.max_tokens:
            raise self._cut("text", text, length)

    def decode(self, ids: list[int] | Int[Tensor, " tokens"]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _cut(self, what: str, text: str, length: int) -> DataError:
        return DataError(
            f"{what} has {length} tokens, the limit is {self.max_tokens}: it would be cut ({text[:60]!r}…)"
        )

    def _ids(self, text: str) -> list[int]:
        # verbose=False: transformers would warn that a long text cannot be run; the limit here is max_tokens.
        return self._tokenizer(text, split_special_tokens=True, truncation=False, verbose=False)["input_ids"]


def pad(rows: list[Int[Tensor, " _"]], pad_id: int) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Rows of ids padded on the right to the longest, and the mask that is True on real tokens."""
    if not rows:
        return torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0, dtype=torch.bool)
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]
