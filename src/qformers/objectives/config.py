"""Settings of the stage-1 objectives. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass

from qformers.errors import ConfigError


@dataclass(frozen=True)
class Stage1LossConfig:
    """The loss is ITC + ITM + ITG with equal weights (BLIP-2, section 3.1)."""

    itg: bool = True
    """False leaves ITG out, its pass over the captions too, as the first row of the paper's table 6; a model trained
    so retrieves and matches, and its Q-Former has not learned to say anything."""
    label_smoothing: float = 0.1
    """Of the ITC targets and of the ITG tokens, as the authors' code (the paper does not say)."""
    hard_negative_fraction: float = 1.0
    """Share of ITM's negatives drawn by similarity; the rest evenly. The paper's is 1; a short run needs easy ones
    too: with hard ones alone ITM was still at chance when runs of 110 and 170 steps ended."""
    itm_fraction: float = 1.0
    """Share of each batch's pictures and of its texts that ITM scores. The paper's is 1; ITM is two thirds of a step's
    work, so a run short of time sees more pictures with less of it."""
    itc_steps: int = 0
    """So many first steps train ITC alone, at less than half the work. ITM draws negatives by ITC's similarities and
    learns little before they mean something, so a run short of time starts with it later. The paper has none."""
    min_temperature: float = 0.01
    """The learned temperature is kept above it. CLIP's bound: no logit beyond 100. On little data a higher one keeps
    ITC from telling the training captions apart ever more sharply, which costs recall on words it has not seen."""
    max_temperature: float = 0.5
    """The learned temperature is kept below it: above, all similarities look alike to ITC and nothing is learned. A
    run that arrives there has too large a learning rate, and a warning says so. ALBEF's bound; LAVIS's BLIP-2: none."""
    use_image_ids: bool = True
    """Pairs that share an image id share ITC targets and are never each other's ITM negatives."""

    def __post_init__(self) -> None:
        if self.itm_fraction == 0:
            raise ConfigError("objectives.itm_fraction is 0: ITM needs at least one pair of each batch")
        for name in ("label_smoothing", "hard_negative_fraction", "itm_fraction"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"objectives.{name} is {share}: must be between 0 and 1")
        if self.itc_steps < 0:
            raise ConfigError(f"objectives.itc_steps is {self.itc_steps}: it counts steps from 0")
        if self.min_temperature <= 0:
            raise ConfigError(f"objectives.min_temperature is {self.min_temperature}: similarities are divided by it")
        if self.max_temperature < self.min_temperature:
            raise ConfigError(
                f"objectives.max_temperature is {self.max_temperature}, min_temperature {self.min_temperature}: "
                "the temperature would have no room"
            )
