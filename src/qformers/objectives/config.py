"""Settings of the stage-1 objectives. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass

from qformers.errors import ConfigError


@dataclass(frozen=True)
class Stage1LossConfig:
    """The loss is ITC + ITM + ITG with equal weights (BLIP-2, section 3.1)."""

    label_smoothing: float = 0.1
    """Of the ITC targets and of the ITG tokens, as the authors' code (the paper does not say)."""
    hard_negative_fraction: float = 1.0
    """Share of ITM's negatives drawn by similarity; the rest evenly. The paper's is 1; a short run needs easy ones
    too: with hard ones alone ITM was still at chance when runs of 110 and 170 steps ended."""
    use_image_ids: bool = True
    """Pairs that share an image id share ITC targets and are never each other's ITM negatives."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "hard_negative_fraction"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"objectives.{name} is {share}: must be between 0 and 1")
