"""What every part of the toolkit trains and evaluates on: one batch of pictures with words."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
class Batch:
    """Pictures (as pixels or as precomputed frozen features, exactly one of the two) and one caption for each.

    Stage 1: `input_ids` are `[CLS] caption [SEP]`. Stage 2: `input_ids` are what the language model reads and
    `labels` what it is to say, IGNORED_LABEL elsewhere: of a decoder-only model at the same positions, of an
    encoder-decoder the decoder's. All are padded on the right to the longest *of this batch*.
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
    broken: tuple[BrokenImage, ...] = field(default=())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies overlap with compute when the tensors are pinned."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def rows(self, some: slice) -> Batch:
        """Some of its rows (views), padded as they are; what was left out for being broken is not repeated."""
        cut = {name: value[some] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **cut, names=self.names[some], broken=())

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        pinned = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **pinned)
