"""What the demo's data set is made of. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoDataConfig:
    """What to build.

    `concept_views` are how often each picture of a training concept is shown: as it is, then smaller, tilted and
    moved. `singles` are extra pictures for each training concept, pasted on other grounds. `scenes` are composed of
    `scene_objects` different things; those of two come with a twin in which they have changed places.
    """

    concept_views: int = 2
    scenes: int = 5000
    scene_objects: int = 50
    held_out_scenes: int = 300
    validation_scenes: int = 100
    held_out_concepts: int = 248
    validation_concepts: int = 80
    singles: int = 0
    image_px: int = 224
    seed: int = 0
    workers: int = 2


@dataclass(frozen=True)
class SceneQuestionsConfig:
    """How many scenes, of how many different things. Each scene is asked one question of each kind."""

    scenes: int = 3000
    test_scenes: int = 600
    things: int = 40
    image_px: int = 126
    seed: int = 0
