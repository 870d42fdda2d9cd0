"""How much of everything the study does, at three sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qformers.demo.config import DemoDataConfig
from qformers.demo.recipe import STANDARD, DemoSize
from qformers.models.config import PresetName

StudySizeName = Literal["full", "quick", "tiny"]
SWAPPED = 0.3  # of the noisy captions


@dataclass(frozen=True)
class StudySize:
    """`demo` has the sizes of every arm's recipe; the rest is what the demo does not have.

    Of `demo`, `itc_steps` are a run of ITC alone, and the steps beyond them a run of all three losses that goes on from
    it.
    `web_scenes` of the training scenes are kept from all arms but those about CapFilt, whose pictures they are. Figures
    come from `held_out_pictures` of each kind, and held-out losses from the first `loss_pictures` scenes.
    """

    demo: DemoSize
    web_scenes: int
    held_out_pictures: int
    loss_pictures: int
    training_question_pictures: int
    asked_pictures: int
    query_counts: tuple[int, ...]
    sampled_captions: int
    preset: PresetName = "small"


FULL = StudySize(
    demo=replace(
        STANDARD,
        data=DemoDataConfig(concept_views=1, scenes=1800, held_out_scenes=150, validation_scenes=60, singles=0),
        steps=110,
        itc_steps=80,
        batch_size=64,
        rerank=8,
        itm_fraction=0.5,
        captioning_steps={"smollm2": 30, "t5": 100},
        t5_steps=400,
        vqa_steps=30,
    ),
    web_scenes=600,
    held_out_pictures=150,
    loss_pictures=48,
    training_question_pictures=2000,
    asked_pictures=50,
    query_counts=(1, 4, 8, 16, 32),
    sampled_captions=3,
)
SIZES: dict[StudySizeName, StudySize] = {
    "full": FULL,
    "quick": replace(
        FULL,
        demo=replace(
            FULL.demo,
            data=replace(FULL.demo.data, scenes=600, held_out_scenes=60, held_out_concepts=120, validation_concepts=40),
            image_px=70,
            steps=20,
            itc_steps=10,
            batch_size=32,
            captioning_steps={"smollm2": 8, "t5": 30},
            t5_steps=120,
            vqa_steps=8,
        ),
        web_scenes=150,
        held_out_pictures=60,
        loss_pictures=24,
        training_question_pictures=400,
        asked_pictures=10,
        query_counts=(1, 8),
        sampled_captions=2,
    ),
    # Of the tests, whose pictures and models are random: nothing can be learned, everything runs.
    "tiny": replace(
        FULL,
        demo=replace(
            FULL.demo,
            steps=6,
            itc_steps=3,
            batch_size=4,
            image_px=56,
            rerank=4,
            captioning_steps={"smollm2": 6, "t5": 6},
            captioning_batch_size=4,
            vqa_steps=6,
        ),
        web_scenes=16,
        held_out_pictures=8,
        loss_pictures=4,
        training_question_pictures=16,
        asked_pictures=4,
        query_counts=(1, 8),
        sampled_captions=2,
        preset="tiny",
    ),
}
