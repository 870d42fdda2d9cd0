"""From a finished demo to its report: real retrievals, right and wrong, and where the queries look."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from qformers.data.dataset import CaptionDataset
from qformers.data.images import load_image
from qformers.data.sources import picture_of
from qformers.demo.captions import DemoCaptions
from qformers.demo.dataset import DemoData
from qformers.demo.packages import ASSETS
from qformers.demo.recipe import DemoSize, Size
from qformers.demo.report import (
    AnswerExample,
    Answering,
    AttentionExample,
    CaptionExample,
    Captions,
    DemoResults,
    Evaluation,
    ImageQuery,
    Source,
    TextQuery,
    Training,
    write_report,
)
from qformers.demo.vqa import ARMS, DemoAnswers, training_phase
from qformers.evaluation.run import RetrievalScores
from qformers.predictor import Predictor, load
from qformers.training.config import TrainConfig
from qformers.training.loop import TrainResult
from qformers.training.setup import flat_settings

SHOWN_QUERIES, SHOWN_CANDIDATES = 8, 3
SHOWN_ATTENTION, SHOWN_MAPS = 4, 6
USED_FOR = {
    "dinov2-onnx": "frozen image encoder (DINOv2-small)",
    "minilm": "start of the Q-Former; sentence embeddings of the baseline",
    "smollm2": "frozen language model (SmolLM2-135M-Instruct)",
    "emojibase": "words of the emoji",
    "fluent": "emoji pictures",
    "google": "emoji pictures, second vendor",
    "twitter": "emoji pictures, third vendor",
    "tuxpaint": "stamps with captions, cut-outs of scenes",
    "gcompris": "photographs behind the scenes",
    "easy-vqa": "pictures with questions",
}


@dataclass(frozen=True)
class HeldOut:
    """An evaluation: its title, the kind of pictures it ranks, and a sentence on what training never saw of them."""

    title: str
    kind: str
    unseen: str


HELD_OUT = {
    "concepts": HeldOut(
        "Held-out concepts",
        "concepts",
        "Emoji whose concept appears in no training picture, of no vendor, alone or in a scene.",
    ),
    "scenes": HeldOut(
        "Held-out scenes",
        "scenes",
        "Scenes of two objects that never stand together in training (each does with others); part of them "
        "also mirrored, so that only left and right tell two pictures apart.",
    ),
    "scenes_finetuned": HeldOut(
        "Held-out scenes after fine-tuning for retrieval",
        "scenes",
        "The same scenes, by the model that went on nearly on scenes alone, each beside its mirror image: first with "
        "ITC and captions from left to right and from top to bottom, then with ITC and ITM and captions both ways.",
    ),
}
METHODS = {
    "qformer_reranked": "Q-Former, ITC + ITM",
    "qformer": "Q-Former, ITC",
    "ridge": "ridge regression",
    "chance": "chance",
}


@dataclass(frozen=True)
class DemoRun:
    """What a finished demo leaves for its report; `metrics` is what metrics.json says of the held-out sets."""

    output: Path
    size: Size
    sizes: DemoSize
    seed: int
    data: DemoData
    recipe: TrainConfig
    result: TrainResult
    captioning: TrainConfig
    metrics: Mapping[str, Any]
    skipped: Mapping[str, str]
    pictures: list[str]


def write_demo_report(
    demo: DemoRun,
    scores: Mapping[str, RetrievalScores],
    captions: DemoCaptions,
    answers: DemoAnswers | None,
    held_out: Mapping[str, CaptionDataset],
    seconds: Mapping[str, float],
) -> None:
    """Write report.html into the demo's folder. The data sets of `held_out` must hold pictures, not features."""
    recipe = demo.recipe
    rows = [_rows(Path(run.output)) for run in (recipe, demo.captioning)]
    model = load(demo.result.model)
    counts = demo.data.counts
    flags = {"quick": " --quick", "standard": "", "long": " --long"}[demo.size] + ("" if answers is None else " --vqa")
    used = {"dinov2-onnx", "minilm", *demo.pictures} | (set() if answers is None else {"smollm2", "easy-vqa"})
    if "smollm2" in Path(demo.captioning.output).name:
        used.add("smollm2")
    write_report(
        demo.output,
        DemoResults(
            training=Training(
                image_encoder="DINOv2-small",
                text_start="MiniLM-L6",
                trainable_parameters=sum(p.numel() for p in model.model.parameters() if p.requires_grad),
                queries=recipe.model.num_queries,
                objectives=["ITC", "ITM", "ITG"],
                pictures=counts["train"],
                captions=counts["train_captions"],
                steps=recipe.steps,
                batch_size=recipe.data.batch_size,
                seconds=seconds.get("train", 0.0),
                machine=f"{os.cpu_count()} CPU cores, {platform.machine()}",
            ),
            loss_rows=rows[0],
            captioning_loss_rows=rows[1],
            evaluations=[
                Evaluation(
                    title=HELD_OUT[name].title,
                    held_out=HELD_OUT[name].unseen,
                    images=len(held_out[HELD_OUT[name].kind].first_records),
                    texts=len(scores[name].texts),
                    itm_weight=demo.metrics[name]["itm_weight"],
                    methods={label: demo.metrics[name][key] for key, label in METHODS.items()},
                    text_queries=_text_queries(scores[name], held_out[HELD_OUT[name].kind], demo.seed),
                    image_queries=_image_queries(scores[name], held_out[HELD_OUT[name].kind], demo.seed),
                )
                for name in scores
            ],
            captions=_captions(captions, held_out["scenes"], demo),
            answering=None if answers is None else _answering(answers, demo, seconds),
            attention=_attention(model, held_out["scenes"]),
            seconds=seconds,
            settings=flat_settings(asdict(recipe)),
            rerun=[
                f"qformers demo{flags} --seed {demo.seed} --output {demo.output}",
                f"qformers caption PICTURE --model {demo.captioning.output}",
            ],
            sources=[
                Source(ASSETS[key].name, ASSETS[key].version, ASSETS[key].licence, ASSETS[key].home, used_for)
                for key, used_for in USED_FOR.items()
                if key in used
            ],
            skipped=demo.skipped,
            notes=[
                "One seed: repeat with --seed 1, 2, … for the spread.",
                f"Of stage 1's {recipe.steps} steps the first {demo.sizes.itc_steps} train ITC alone.",
            ],
        ),
    )


def _rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _captions(captions: DemoCaptions, dataset: CaptionDataset, demo: DemoRun) -> Captions:
    """The figures, and scenes drawn by seed: half of them with every object named, half with one missing."""
    missing = np.array([1 + captions.named(picture).count(False) for picture in range(len(captions.objects))])
    examples = [
        CaptionExample(
            picture=_picture(dataset, picture),
            caption=captions.scores.captions[picture],
            reference=captions.scores.references[picture][0],
            named=dict(zip(captions.objects[picture], captions.named(picture), strict=True)),
        )
        for picture in _half_and_half(missing, demo.seed)
    ]
    found = demo.metrics["captions"]
    own = {name: value for name, value in found.items() if name != "shuffled"}
    return Captions(
        len(captions.objects),
        {"Q-Former + language model": own, "prompts of another scene": found["shuffled"]},
        examples,
    )


def _answering(answers: DemoAnswers, demo: DemoRun, seconds: Mapping[str, float]) -> Answering:
    """The figures, and questions drawn by seed: half of them answered right, half not."""
    said = answers.arms["qformer"].answers
    wrong = np.array([1 + (answer not in row["answers"]) for answer, row in zip(said, answers.rows, strict=True)])
    metrics = demo.metrics["vqa"]
    titles = {name: arm.title for name, arm in ARMS.items()} | {"majority": f"always “{answers.majority}”"}
    return Answering(
        questions=len(said),
        types=sorted({row["answer_type"] for row in answers.rows}),
        methods={title: metrics[name] for name, title in titles.items()},
        examples=[
            AnswerExample(
                load_image(answers.rows[row]["image"]),
                answers.rows[row]["question"],
                said[row],
                answers.rows[row]["answers"][0],
            )
            for row in _half_and_half(wrong, demo.seed)
        ],
        steps=demo.sizes.vqa_steps,
        minutes=seconds[training_phase("qformer")] / 60,
    )


def _text_queries(scores: RetrievalScores, dataset: CaptionDataset, seed: int) -> list[TextQuery]:
    """Texts drawn by seed, half of them found at once, half not, with their best pictures."""
    assert scores.reranked is not None
    ranking, right = scores.reranked.t2i, scores.text_to_image
    queries = []
    for text in _half_and_half(ranking.ranks, seed):
        best = ranking.candidates[text, :SHOWN_CANDIDATES]
        queries.append(
            TextQuery(
                text=scores.texts[text],
                pictures=[_picture(dataset, int(image)) for image in best],
                right=[bool(image == right[text]) for image in best],
                rank=int(ranking.ranks[text]),
                right_picture=_picture(dataset, int(right[text])),
            )
        )
    return queries


def _image_queries(scores: RetrievalScores, dataset: CaptionDataset, seed: int) -> list[ImageQuery]:
    """Pictures drawn by seed, half of them described at once, half not, with their best texts."""
    assert scores.reranked is not None
    ranking, itc = scores.reranked.i2t, scores.itc.numpy()
    captioned = np.unique(scores.text_to_image)
    queries = []
    for row in _half_and_half(ranking.ranks, seed):
        image = int(captioned[row])
        texts = ranking.candidates[image]
        own = scores.text_to_image[texts] == image
        all_own = np.flatnonzero(scores.text_to_image == image)
        right = texts[own.argmax()] if own.any() else all_own[itc[image, all_own].argmax()]
        queries.append(
            ImageQuery(
                picture=_picture(dataset, image),
                texts=[scores.texts[text] for text in texts[:SHOWN_CANDIDATES]],
                right=[bool(is_own) for is_own in own[:SHOWN_CANDIDATES]],
                rank=int(ranking.ranks[row]),
                right_text=scores.texts[right],
            )
        )
    return queries


def _half_and_half(ranks: np.ndarray, seed: int) -> list[int]:
    """Queries drawn at random: as many at rank 1 as below it, where there are so many."""
    drawn = np.random.default_rng(seed).permutation(len(ranks))
    found, missed = drawn[ranks[drawn] == 1], drawn[ranks[drawn] > 1]
    half = SHOWN_QUERIES // 2
    return [int(query) for query in (*found[:half], *missed[:half])]


def _attention(model: Predictor, dataset: CaptionDataset) -> list[AttentionExample]:
    """Last cross-attending block of the first held-out scenes, for the queries whose maps differ most."""
    examples = []
    for position in range(min(SHOWN_ATTENTION, len(dataset.first_records))):
        picture = _picture(dataset, position)
        text = dataset.records[int(dataset.first_records[position])]["captions"][0]
        maps = model.attention(picture)[-1].float().numpy()
        chosen = most_different(maps, SHOWN_MAPS)
        examples.append(AttentionExample(picture, text, chosen, maps[chosen]))
    return examples


def most_different(maps: Float[np.ndarray, "queries rows columns"], count: int) -> list[int]:
    """Queries picked one by one, each the farthest from those before it, from the most focused one on."""
    flat = maps.reshape(len(maps), -1)
    chosen = [int(flat.max(axis=1).argmax())]
    while len(chosen) < min(count, len(flat)):
        distances = np.linalg.norm(flat[:, None] - flat[None, chosen], axis=2).min(axis=1)
        chosen.append(int(distances.argmax()))
    return chosen


def _picture(dataset: CaptionDataset, position: int) -> Image.Image:
    return load_image(picture_of(dataset.records[int(dataset.first_records[position])]))
