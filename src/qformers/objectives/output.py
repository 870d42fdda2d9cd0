"""What an objective gives the training loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class StepOutput:
    """Named loss terms, and scalars worth logging (detached)."""

    losses: dict[str, Float[Tensor, ""]]
    stats: dict[str, Float[Tensor, ""]]

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.losses.values())).sum()
