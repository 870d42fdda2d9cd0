"""One arm with one seed: its recipe, its training, and what it is worth on pictures that no arm has seen."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from qformers.capfilt.config import OutputConfig, RankingConfig, SamplingConfig, WorkConfig
from qformers.capfilt.ranker import open_ranker
from qformers.capfilt.run import clean_captions
from qformers.convert.run import open_model
from qformers.data.config import SourceConfig
from qformers.data.dataset import CaptionDataset
from qformers.data.images import load_image
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.demo.captions import SETTINGS, object_recall
from qformers.demo.recipe import LanguageModelName, demo_captioning_recipe, demo_recipe, demo_vqa_recipe
from qformers.demo.vqa import greedy_answers
from qformers.evaluation.captioning import Captioner, caption_dataset
from qformers.evaluation.run import Reranking, score_retrieval
from qformers.models.saving import save_model
from qformers.precision import autocast
from qformers.study.arms import BASE, CAPTIONS, CONTRAST, Arm
from qformers.study.config import StudySize
from qformers.study.inputs import Inputs
from qformers.training.config import TrainConfig
from qformers.training.features import precompute
from qformers.training.loop import train
from qformers.training.plan import plan
from qformers.training.setup import build_run

CHECKPOINT_STEPS = 25
EVALUATIONS = 6  # of the held-out loss, over a run
LOGGED = 20  # rows of metrics of a run, about
KEPT = 0.9  # of true captions: dropping one costs more than keeping a swapped one
KEPT_MODELS = (CONTRAST, BASE, CAPTIONS)  # others go on from them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """Where everything is: the study's folder, what it reads, how much of everything, and who says captions."""

    output: Path
    inputs: Inputs
    size: StudySize
    captioner: LanguageModelName

    def part(self, name: str) -> Path:
        """One of the files of `inputs.write_parts`."""
        return self.output / "parts" / f"{name}.jsonl"

    def folder(self, name: str, seed: int) -> Path:
        """The run of an arm, its result beside its log."""
        return self.output / "arms" / f"{name}-{seed}"

    def result(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """What `run_arm` returned, if it has."""
        file = self.folder(arm.name, seed) / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def run_arm(bench: Bench, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and measure; `metrics`, `curve` (held-out loss by step, of stage 2), and `cost`, which differs every time.

    A run that was killed goes on from its checkpoint; one that is finished is only read.
    """
    if (known := bench.result(arm, seed)) is not None:
        return known
    started = time.perf_counter()
    noise = _clean(bench, seed) if arm.records == "cleaned" else {}
    config = recipe(bench, arm, seed)
    precompute(config)
    train(config, resume="auto")
    measure = {"retrieval": _retrieval, "captions": _captions, "answers": _answers}[arm.task]
    rows = _rows(Path(config.output) / "metrics.jsonl")
    result = {
        "metrics": {**measure(bench, config), **noise},
        "curve": [[row["step"], row["validation/lm"]] for row in rows if "validation/lm" in row],
        "cost": {**_cost(config, rows), "seconds": time.perf_counter() - started},
    }
    if result["curve"]:
        result["metrics"]["lm"] = result["curve"][-1][1]
    folder = Path(config.output)
    (folder / "result.json.partial").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "result.json.partial").replace(folder / "result.json")
    # Nothing goes on from here: fifty runs would otherwise keep tens of gigabytes.
    shutil.rmtree(folder / "checkpoints")
    if arm not in KEPT_MODELS:
        shutil.rmtree(folder / "model")
    return result


def recipe(bench: Bench, arm: Arm, seed: int) -> TrainConfig:
    """The demo's recipe of the arm's task, with the arm's changes; an untrained start is made first."""
    inputs, size, output = bench.inputs, bench.size, bench.folder(arm.name, seed)
    records = _cleaned(bench, seed) / "captions-*.jsonl" if arm.records == "cleaned" else bench.part(arm.records)
    config = demo_recipe(
        size.demo,
        encoder=inputs.encoder,
        text_encoder=inputs.text_encoder,
        source=records,
        features=bench.output,  # named below, when all that they depend on is known
        output=output,
        seed=seed,
    )
    # The tests' text encoder is a tokenizer without weights.
    shape = replace(config.model, preset=size.preset, start_from_text_encoder=size.preset != "tiny")
    config = replace(config, model=shape, checkpoint_every_steps=CHECKPOINT_STEPS)
    if arm.task == "retrieval":
        alone, all_losses = size.demo.itc_steps, size.demo.steps - size.demo.itc_steps
        steps, itc_steps = (alone, alone) if arm.start is None else (all_losses, 0)
        warm_up = replace(config.optimiser, warmup_steps=max(2, steps // 5))
        losses = replace(config.objectives, itc_steps=itc_steps)
        config = replace(config, steps=steps, objectives=losses, optimiser=warm_up)
    if arm.records != "train":  # each picture is its own: there are no views of one concept
        alone = replace(config.data, train=[SourceConfig(str(records))])
        config = replace(config, data=alone)
    if arm.task == "captions":
        config = demo_captioning_recipe(
            size.demo, config, name=bench.captioner, language_model=inputs.captioner, output=output
        )
        loss = replace(config.data, validation=[SourceConfig(str(bench.part("loss")))])
        config = replace(config, data=loss, evaluate_every_steps=max(1, config.steps // EVALUATIONS))
    if arm.task == "answers":
        config = demo_vqa_recipe(
            size.demo,
            config,
            language_model=inputs.answerer,
            source=bench.part("questions"),
            features=bench.output,
            output=output,
            reads="question",
        )
    start = None if arm.start is None else str(bench.folder(arm.start, seed))
    changes: dict[str, Any] = {part: replace(getattr(config, part), **set_) for part, set_ in arm.changes.items()}
    log_every = max(1, config.steps // LOGGED)
    config = replace(config, start=start, log_every_steps=log_every, **changes)
    if arm.start == "untrained" and not (bench.folder("untrained", seed) / "model").exists():
        _save_untrained(replace(recipe(bench, CONTRAST, seed), output=str(bench.folder("untrained", seed))))
    kind = "questions" if arm.task == "answers" else f"cleaned-{seed}" if arm.records == "cleaned" else arm.records
    return with_features(bench, config, kind)


def with_features(bench: Bench, config: TrainConfig, records: str) -> TrainConfig:
    """`config` with the folder of its precomputed features: of `records`, by the layer that is read."""
    folder = bench.output / "features" / f"{records}{config.model.vision_layer}"
    return replace(config, data=replace(config.data, features=str(folder)))


def _save_untrained(config: TrainConfig) -> None:
    """The model that `config` would train, as it is before the first step."""
    precompute(config)
    run = build_run(config, None, Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no"))
    save_model(run.model, config.model, run.tokenizer, Path(config.output) / "model", run.language)


def _clean(bench: Bench, seed: int) -> dict[str, float]:
    """CapFilt of the noisy captions by this seed's own models; what became of true and of swapped captions."""
    output, ranker = _cleaned(bench, seed), str(bench.folder(BASE.name, seed))
    clean_captions(
        SourceConfig(str(bench.part("noisy"))),
        captioner=str(bench.folder(CAPTIONS.name, seed)),
        ranker=ranker,
        output=OutputConfig(str(output), shard_pictures=64),
        sampling=SamplingConfig(captions=bench.size.sampled_captions, max_new_tokens=16, seed=seed),
        ranking=RankingConfig(min_score=_lowest_score(ranker, bench.part("clean"))),
        work=WorkConfig(threads=torch.get_num_threads()),
    )
    kept = {row["image_id"]: row["captions"] for file in sorted(output.glob("captions-*.jsonl")) for row in _rows(file)}
    found: dict[bool, list[bool]] = {False: [], True: []}
    for row in _rows(bench.part("noisy")):
        found[row["swapped"]].append(row["caption"] in kept.get(row["image_id"], []))
    return {
        name: sum(found[swapped]) / len(found[swapped])
        for name, swapped in (("true_kept", False), ("swapped_kept", True))
        if found[swapped]
    }


def _lowest_score(ranker: str, clean: Path) -> float:
    """What a share KEPT of clean pairs reach: without it the best of a poor captioner are kept."""
    judge, rows = open_ranker(ranker, "cpu"), _rows(clean)
    pixels = torch.stack([judge.transform(load_image(row["image"])) for row in rows])
    scores = judge.score(judge.encode(pixels), [[row["caption"]] for row in rows])
    return round(float(np.quantile(scores, 1 - KEPT)), 4)


def _cleaned(bench: Bench, seed: int) -> Path:
    return bench.output / "cleaned" / str(seed)


def _held_out(bench: Bench, config: TrainConfig, part: str) -> CaptionDataset:
    """A held-out part in evaluation order, with its features."""
    shown = replace(config, data=replace(config.data, train=[SourceConfig(str(bench.part(part)))]))
    store = precompute(with_features(bench, shown, part))
    tokenizer = CaptionTokenizer.from_pretrained(config.model.text_encoder, config.data.max_text_tokens)
    return CaptionDataset(
        open_source(shown.data.train[0]), tokenizer, config.data.transform, train=False, features=store
    )


def _retrieval(bench: Bench, config: TrainConfig) -> dict[str, float]:
    model = open_model(Path(config.output) / "model").stage1()
    learned_itm = config.objectives.itc_steps < config.steps
    how = Reranking(bench.size.demo.rerank, "itm+itc/temperature") if learned_itm else None
    with autocast("cpu"):
        scores = score_retrieval(model, _held_out(bench, config, "held_out"), how)
    return scores.metrics() | {f"reranked_{name}": value for name, value in scores.reranked_metrics().items()}


def _captions(bench: Bench, config: TrainConfig) -> dict[str, float]:
    captioner = Captioner.of(open_model(Path(config.output) / "model"))
    with autocast("cpu"):
        scores = caption_dataset(captioner, _held_out(bench, config, "held_out_scenes"), SETTINGS)
    (Path(config.output) / "captions.json").write_text(json.dumps(scores.captions, indent=0), encoding="utf-8")
    objects = [[thing["name"] for thing in row["objects"]] for row in _rows(bench.part("held_out_scenes"))]
    return scores.metrics() | object_recall(scores.captions, objects)


def _answers(bench: Bench, config: TrainConfig) -> dict[str, float]:
    source = SourceConfig(str(bench.part("asked")))
    shown = replace(config, data=replace(config.data, train=[source]))
    found, _ = greedy_answers(with_features(bench, shown, "asked"))
    return found.metrics("exact")


def _cost(config: TrainConfig, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the median step; of stage 1 also the counted work of one with all losses."""
    cost, counted = seconds_per_step(rows, config.data.batch_size), config.stage == 1 and config.objectives.itg
    return cost | ({"step_gflop": plan(config, gpus=1).step_flops / 1e9} if counted else {})


def seconds_per_step(rows: list[dict[str, Any]], batch_size: int) -> dict[str, float]:
    """Of the median row of a training log; rows that hold validation losses alone do not count."""
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return {"seconds_per_step": batch_size / median(rates)}


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
