"""The demo's second half: stage 2 on the same features, and what its captions of held-out scenes are worth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qformers.data.dataset import CaptionDataset
from qformers.evaluation.captioning import Captioner, CaptionScores, caption_dataset
from qformers.models.config import GenerationSettings
from qformers.models.saving import load_model
from qformers.precision import autocast
from qformers.training.loop import TrainResult

METRICS = ("cider", "bleu4", "rouge_l")
SETTINGS = GenerationSettings(max_new_tokens=24)


@dataclass(frozen=True)
class DemoCaptions:
    """Captions of the held-out scenes, the same model's with another scene's prompts, and what stands in each scene."""

    scores: CaptionScores
    shuffled: CaptionScores
    objects: list[list[str]]

    def metrics(self) -> dict[str, float | dict[str, float]]:
        """As metrics.json holds them: the model's, and under `shuffled` the control's."""
        return {**self._metrics(self.scores), "shuffled": self._metrics(self.shuffled)}

    def named(self, picture: int) -> list[bool]:
        """Of each object of a picture, whether its caption names it."""
        return [names(self.scores.captions[picture], name) for name in self.objects[picture]]

    def _metrics(self, scores: CaptionScores) -> dict[str, float]:
        found = scores.metrics()
        return {**{name: found[name] for name in METRICS}, **object_recall(scores.captions, self.objects)}


def caption_held_out_scenes(
    result: TrainResult, scenes: CaptionDataset, objects: Sequence[Sequence[str]]
) -> DemoCaptions:
    """Greedy captions of every scene of `scenes`, and the control: each scene captioned by its neighbour's prompts.

    Mirrored scenes lie side by side and share their objects, so the neighbour is half the set away.
    """
    captioner = Captioner.of(load_model(result.model))
    with autocast("cpu"):
        scores = caption_dataset(captioner, scenes, SETTINGS)
    half = len(scores.captions) // 2
    moved = scores.captions[half:] + scores.captions[:half]
    shuffled = CaptionScores(scores.image_ids, moved, scores.references)
    return DemoCaptions(scores, shuffled, [list(names_) for names_ in objects])


def names(caption: str, name: str) -> bool:
    """Whether the words of `name` stand in `caption` one after another, in lower case."""
    return re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", caption.lower()) is not None


def object_recall(captions: Sequence[str], objects: Sequence[Sequence[str]]) -> dict[str, float]:
    """`object_recall`, the share of all objects that are named, and `all_objects`, of captions that name every one."""
    found = [
        [names(caption, name) for name in of_picture] for caption, of_picture in zip(captions, objects, strict=True)
    ]
    return {
        "object_recall": float(np.mean([named for row in found for named in row])),
        "all_objects": float(np.mean([all(row) for row in found])),
    }
