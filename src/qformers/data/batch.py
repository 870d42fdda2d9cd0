"""What every part of the toolkit trains and evaluates on: one batch of pictures with words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED_LABEL = -100  # what torch's cross-entropy and Hugging Face's models leave out


@dataclass(frozen=True)
class BrokenImage:
    """A picture that could not be decoded: left out of its batch, counted, and named in the run's log."""

    name: str
    reason: str


@dataclass(frozen=True)
class SaidAnswers:
    """What the language model reads and is to say to each question of a batch: one answer of each, or several.

    `input_ids` and `labels` as in stage 2; `rows` says whose answer each is, `weights` the share of the people who
    gave it: the shares of a question's answers add up to 1.
    """

    input_ids: Int[Tensor, "answers tokens"]
    attention_mask: Bool[Tensor, "answers tokens"]
    labels: Int[Tensor, "answers label_tokens"]
    rows: Int[Tensor, " answers"]
    weights: Float[Tensor, " answers"]

    def map(self, change: Callable[[Tensor], Tensor]) -> SaidAnswers:
        """The same with every tensor changed."""
        return SaidAnswers(**{name: change(value) for name, value in vars(self).items()})

    def of_rows(self, chosen: Int[Tensor, " batch"]) -> SaidAnswers:
        """The answers of a batch that is made of the rows `chosen` of this one."""
        places = [(place, answer) for place, row in enumerate(chosen.tolist()) for answer in self.answers_of(row)]
        answers = torch.tensor([answer for _, answer in places], device=self.rows.device)
        rows = torch.tensor([place for place, _ in places], device=self.rows.device)
        return replace(self.map(lambda tensor: tensor[answers]), rows=rows)

    def answers_of(self, row: int) -> list[int]:
        """Where the answers of a question are."""
        return (self.rows == row).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Batch:
    """Pictures (as pixels or as precomputed frozen features, exactly one of the two) and one caption for each.

    Stage 1: `input_ids` are `[CLS] caption [SEP]`. Stage 2: `input_ids` are what the language model reads and
    `labels` what it is to say, IGNORED_LABEL elsewhere: of a decoder-only model at the same positions, of an
    encoder-decoder the decoder's. All are padded on the right to the longest *of this batch*.
    Questions: `input_ids` are `[CLS] question [SEP]` and `answers` is what the language model reads and says.
    `attention_mask` is True on the real tokens of `input_ids`. Rows with equal `image_ids` show the same picture.
    `names` say where each row came from, for errors and logs.
    """

    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    image_ids: Int[Tensor, " batch"]
    names: tuple[str, ...]
    pixel_values: Float[Tensor, "batch 3 height width"] | None = None
    patch_embeds: Float[Tensor, "batch patches vision_dim"] | None = None
    labels: Int[Tensor, "batch label_tokens"] | None = None
    answers: SaidAnswers | None = None
    broken: tuple[BrokenImage, ...] = field(default=())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies overlap with compute when the tensors are pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, some: slice) -> Batch:
        """Some of its rows (views), padded as they are; what was left out for being broken is not repeated."""
        cut: dict[str, Any] = {name: value[some] for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.answers is not None:
            cut["answers"] = self.answers.of_rows(torch.arange(len(self), device=self.input_ids.device)[some])
        return replace(self, **cut, names=self.names[some], broken=())

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.answers is not None:
            changed["answers"] = self.answers.map(change)
        return replace(self, **changed)
