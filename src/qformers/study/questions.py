"""What the study asks: a claim of the paper, the arms that test it, and the rule that says how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qformers.study import arms
from qformers.study.arms import BASE, CONTRAST, Arm
from qformers.study.config import SWAPPED, StudySize

Verdict = Literal["agrees", "does not agree", "cannot tell"]
Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Arm → seed → metric → value."""

LEAST_SEEDS = 3
LOWER_IS_BETTER = {"lm"}
METRICS = {
    "mean_recall": "mean recall, ITC",
    "reranked_mean_recall": "mean recall, re-ranked",
    "i2t_r1": "picture → text R@1",
    "t2i_r1": "text → picture R@1",
    "reranked_i2t_r1": "picture → text R@1, re-ranked",
    "reranked_t2i_r1": "text → picture R@1, re-ranked",
    "lm": "held-out loss",
    "cider": "CIDEr",
    "object_recall": "objects named",
    "accuracy": "accuracy",
    "seconds_per_step": "seconds a step",
    "step_gflop": "GFLOP a step",
    "true_kept": "true captions kept",
    "swapped_kept": "swapped captions kept",
}


@dataclass(frozen=True)
class Comparison:
    """The claim that `better` beats `other`, each an arm's own `metric` unless `other_metric` says another."""

    better: Arm
    other: Arm
    metric: str
    other_metric: str | None = None

    def differences(self, values: Values) -> dict[int, float]:
        """By seed that both have: by how much the claim holds; below 0 it does not."""
        mine, others = values.get(self.better.name, {}), values.get(self.other.name, {})
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        return {
            seed: sign * (mine[seed][self.metric] - others[seed][self.other_metric or self.metric])
            for seed in sorted(mine.keys() & others.keys())
        }


def verdict(differences: Mapping[int, float]) -> Verdict:
    """With `LEAST_SEEDS` or more, all of one sign: "agrees" above 0, "does not agree" below; else "cannot tell"."""
    if len(differences) < LEAST_SEEDS:
        return "cannot tell"
    if all(difference > 0 for difference in differences.values()):
        return "agrees"
    if all(difference < 0 for difference in differences.values()):
        return "does not agree"
    return "cannot tell"


@dataclass(frozen=True)
class Question:
    """One section of the page. The first of `metrics` is drawn, `figure` says how; `base` names the arm here that the
    others differ from: the base arm, or that of ITC alone."""

    number: int
    title: str
    claim: str
    here: str
    arms: tuple[Arm, ...]
    metrics: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    base: str = BASE.title
    figure: Literal["bars", "curves", "queries"] = "bars"

    def title_of(self, arm: Arm) -> str:
        """What an arm is called here; the one that others differ from by what sets it apart in this question."""
        return self.base if arm in (BASE, CONTRAST) else arm.title

    def claim_of(self, comparison: Comparison) -> str:
        """A comparison in words."""
        better, other = self.title_of(comparison.better), self.title_of(comparison.other)
        metric, instead = METRICS[comparison.metric], comparison.other_metric
        if instead is not None:
            return f"“{better}”: {metric} beats {METRICS[instead]}"
        return f"“{better}” beats “{other}” by {metric}"


def questions_of(size: StudySize) -> dict[int, Question]:
    """All questions by number."""
    asked = (*_of_stage1(), *_of_queries(size), *_of_stage2(size), *_of_captions(size))
    return {question.number: question for question in sorted(asked, key=lambda question: question.number)}


def _of_stage1() -> list[Question]:
    """How stage 1 is trained: its objectives, its negatives, the layer that it reads."""
    return [
        Question(
            1,
            "Does generating text help retrieval?",
            "Table 6: with ITG beside ITC and ITM, recall at 1 on COCO rises from 84.5 to 85.4 (picture → text) and "
            "from 67.2 to 68.3 (text → picture), re-ranked.",
            "Held-out concepts and scenes in one set of candidates. Both go on from one Q-Former that has learned by "
            "ITC alone. The verdict is by re-ranked mean recall.",
            (BASE, arms.NO_ITG),
            ("reranked_mean_recall", "mean_recall", "reranked_i2t_r1", "reranked_t2i_r1"),
            (Comparison(BASE, arms.NO_ITG, "reranked_mean_recall"),),
        ),
        Question(
            3,
            "Which layer of the image encoder?",
            "Section 3.3: the second-to-last layer's output is slightly better than the last one's; no figures.",
            "The encoder is DINOv2, trained without text, where the paper's are CLIP's. ITC alone; the verdict is by "
            "its mean recall.",
            (CONTRAST, arms.LAST_LAYER),
            ("mean_recall", "i2t_r1", "t2i_r1"),
            (Comparison(CONTRAST, arms.LAST_LAYER, "mean_recall"),),
            base="second-to-last layer",
        ),
        Question(
            7,
            "Hard negatives, and re-ranking?",
            "Sections 3.1 and 4.4: ITM's negatives are hard ones, and its score re-ranks ITC's best candidates; no "
            "figures without either.",
            "Hard negatives are drawn by ITC's similarities, random ones evenly; so short a run needs some of these. "
            "All go on from one Q-Former that has learned by ITC alone.",
            (BASE, arms.HARD, arms.RANDOM),
            ("reranked_mean_recall", "mean_recall", "reranked_i2t_r1", "reranked_t2i_r1"),
            (
                Comparison(arms.HARD, arms.RANDOM, "reranked_mean_recall"),
                Comparison(BASE, arms.RANDOM, "reranked_mean_recall"),
                Comparison(BASE, BASE, "reranked_mean_recall", "mean_recall"),
            ),
            base="half hard, half random",
        ),
    ]


def _of_queries(size: StudySize) -> list[Question]:
    """How many queries there are."""
    of_demo = size.demo.num_queries
    by_count = tuple(arms.with_queries(count, of_demo) for count in size.query_counts)
    return [
        Question(
            4,
            "How many queries?",
            "Section 3.1: 32 queries, a bottleneck much narrower than the patches; no other number is tried.",
            f"ITC alone. The verdict is whether {max(size.query_counts)} queries beat {min(size.query_counts)} by its "
            "mean recall. Seconds are of a step of ITC alone, work is what `qformers plan` counts for a step of all "
            "three losses.",
            by_count,
            ("mean_recall", "i2t_r1", "seconds_per_step", "step_gflop"),
            (Comparison(by_count[-1], by_count[0], "mean_recall"),),
            base=f"{of_demo} queries",
            figure="queries",
        ),
    ]


def _of_stage2(size: StudySize) -> list[Question]:
    """What the language model is given: by a Q-Former with or without a stage 1 or a question, or by another bridge."""
    return [
        Question(
            2,
            "Does stage 2 need stage 1?",
            "Figure 5: without stage 1, zero-shot VQA after stage 2 is far worse, and OPT's gets worse as training "
            "goes on.",
            "The loss on held-out scenes over the steps of stage 2. Both start from the same fresh weights, one of "
            "them by way of stage 1. The verdict is by the loss after the last step.",
            (arms.CAPTIONS, arms.UNTRAINED),
            ("lm", "cider", "object_recall"),
            (Comparison(arms.CAPTIONS, arms.UNTRAINED, "lm"),),
            figure="curves",
        ),
        Question(
            5,
            "Should the queries read the question?",
            "Section 4.3: given the question as text, the queries look where it points; no figures without it.",
            "easy-VQA, on training pictures kept apart. The control reads a text without words and trains as many "
            "weights; the language model is told the question in both. To read a question is a skill to be learned, "
            "for which these steps are few: `docs/vqa.md` has runs of many more.",
            (arms.READS_QUESTION, arms.READS_NOTHING),
            ("accuracy",),
            (Comparison(arms.READS_QUESTION, arms.READS_NOTHING, "accuracy"),),
        ),
        Question(
            6,
            "Is a Q-Former better than what is simpler?",
            "The paper compares with no other bridge. Its critics propose a linear projection, an MLP, or a resampler.",
            f"{size.demo.num_queries} visual tokens and the same steps of stage 2 for all. Only the Q-Former can have "
            "a stage 1, which is as many pictures more; without it is the even match. Each line's claim is that the "
            "Q-Former has the lower loss on held-out scenes: captions after so few steps name too few to rank by.",
            (arms.CAPTIONS, arms.UNTRAINED, *arms.BRIDGES),
            ("lm", "cider", "object_recall"),
            tuple(
                Comparison(qformer, bridge, "lm")
                for qformer in (arms.CAPTIONS, arms.UNTRAINED)
                for bridge in arms.BRIDGES
            ),
        ),
    ]


def _of_captions(size: StudySize) -> list[Question]:
    """What the pictures' captions are worth."""
    return [
        Question(
            8,
            "Does cleaning captions help?",
            "Section 3.3: web captions are replaced by the best two of ten written and the one found (CapFilt); no "
            "figures without it.",
            f"{size.web_scenes} scenes that no other arm has seen, one caption each, of which {SWAPPED:.0%} are "
            f"swapped among each other; the captioner of question 2 writes {size.sampled_captions} of each, the base "
            "arm of the same seed ranks, the best two are kept if they reach what nine tenths of true captions do. ITC "
            "alone learns from either.",
            (arms.CLEANED, arms.NOISY),
            ("mean_recall", "i2t_r1", "true_kept", "swapped_kept"),
            (Comparison(arms.CLEANED, arms.NOISY, "mean_recall"),),
        ),
    ]
