"""What the demo's data set is made of. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoDataConfig:
    """What to build. `singles` are extra pictures for each training concept, pasted on other grounds."""

    scenes: int = 3000
    held_out_scenes: int = 300
    validation_scenes: int = 100
    held_out_concepts: int = 248
    validation_concepts: int = 80
    singles: int = 2
    image_px: int = 224
    seed: int = 0
    workers: int = 2
