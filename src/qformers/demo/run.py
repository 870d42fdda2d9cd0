"""`qformers demo`: fetch, build, precompute, fit the baseline, train, evaluate, report. Resumable at any point."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qformers.data.dataset import CaptionDataset
from qformers.data.features import FeatureStore
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.demo.assets import fetch_pictures
from qformers.demo.baseline import RetrievalSet, embed_sentences, fit_best_ridge, pool_patches, ridge_similarities
from qformers.demo.captions import DemoCaptions, caption_held_out_scenes
from qformers.demo.dataset import SPLITS, DemoData, build_demo_dataset
from qformers.demo.dinov2 import dinov2_folder, minilm_folder
from qformers.demo.recipe import (
    SIZES,
    DemoSize,
    LanguageModelName,
    Size,
    demo_captioning_recipe,
    demo_finetuning_recipes,
    demo_recipe,
    with_scenes,
)
from qformers.demo.showcase import HELD_OUT, DemoRun, write_demo_report
from qformers.demo.smollm2 import smollm2_folder
from qformers.demo.vqa import (
    ARMS,
    DemoAnswers,
    answer_arm,
    gather_answers,
    prepare_questions,
    train_arm,
    training_phase,
)
from qformers.evaluation.retrieval import chance_metrics, retrieval_metrics
from qformers.evaluation.run import Reranking, RetrievalScores, best_itm_weight, score_retrieval
from qformers.models.saving import load_model
from qformers.models.stage1 import Stage1Model
from qformers.precision import autocast
from qformers.training.config import TrainConfig
from qformers.training.features import precompute
from qformers.training.loop import TrainResult, train

console = Console(stderr=True)
EVALUATED = ("concepts", "scenes")


class Stopwatch:
    """Seconds of each phase, kept in a file, so that a demo that was interrupted adds up.

    Phases that go on where they stopped add to what they took before; the others are done again, whole.
    """

    GO_ON = (
        "fetch",
        "data",
        "features",
        "train",
        "finetune",
        "language_model",
        "train_captioner",
        *map(training_phase, ARMS),
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Announce `what`, and count the time it takes, even when it is interrupted."""
        console.print(f"[bold]{name}[/bold]: {what}", highlight=False)
        before = self.seconds.get(name, 0.0) if name in self.GO_ON else 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = before + time.perf_counter() - start
            self.path.write_text(json.dumps(self.seconds), encoding="utf-8")


def run_demo(
    output: Path,
    size: Size = "standard",
    seed: int = 0,
    language_model: LanguageModelName = "t5",
    vqa: bool = False,
) -> dict[str, Any]:
    """Train a Q-Former on real pictures, set it beside a ridge regression, then let a language model speak for it.

    Finished phases found in `output` are not repeated, so the same command resumes an interrupted demo.

    Args:
        vqa: train and compare on easy-VQA's questions too.

    Returns:
        What metrics.json holds.

    Raises:
        DataError: the assets cannot be had, or `output` holds another demo.
    """
    sizes = SIZES[size]
    output.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(output / "seconds.json")
    with watch.phase("fetch", "pretrained models and pictures (once; kept in the cache)"):
        encoder, text_encoder = dinov2_folder(), minilm_folder()
        smollm2 = smollm2_folder() if vqa or language_model == "smollm2" else None
        folders, skipped = fetch_pictures()
    with watch.phase("data", "emoji, stamps and composed scenes, split by concept"):
        data = build_demo_dataset(folders, output / "data", replace(sizes.data, seed=seed))
    recipes = _recipes(sizes, data, encoder, text_encoder, output, seed)
    with watch.phase("features", "frozen DINOv2-small over all pictures, once"):
        stores = {name: precompute(recipe) for name, recipe in recipes.items()}
    datasets = {name: _dataset(recipe, stores[name]) for name, recipe in recipes.items()}
    with watch.phase("baseline", "ridge regression from the same features to MiniLM sentence embeddings"):
        ridge = _ridge(datasets, stores, text_encoder)
    things, both_ways = data.records("train_things"), data.records("train_scenes")
    in_order = data.records("train_scenes_in_order")
    stage1 = with_scenes(recipes["train"], things, both_ways, sizes.scenes_share)
    result, scores = _stage1(sizes, stage1, datasets, watch)
    finetuning = demo_finetuning_recipes(sizes, stage1, things, in_order, both_ways, output / "retrieval")
    scores["scenes_finetuned"] = _finetune(sizes, finetuning, datasets, watch)
    speaker = smollm2 if language_model == "smollm2" else None
    speaker = speaker or _caption_t5((things, in_order), text_encoder, output, seed, sizes.t5_steps, watch)
    captioning = demo_captioning_recipe(
        sizes,
        recipes["train"],
        name=language_model,
        language_model=speaker,
        output=output / f"captioner_{language_model}",
    )
    captioning = with_scenes(captioning, things, in_order, sizes.captioned_scenes_share)
    captions = _stage2(captioning, datasets["held_out_scenes"], data, watch)
    metrics: dict[str, Any] = {name: _table(scores[name], ridge[HELD_OUT[name].kind]) for name in scores}
    metrics["captions"] = captions.metrics()
    answers = None
    if vqa:
        assert smollm2 is not None
        answers = _vqa(sizes, stage1, smollm2, output / "vqa", watch)
        metrics["vqa"] = answers.metrics()
    demo = DemoRun(output, size, sizes, seed, data, stage1, result, captioning, metrics, skipped, sorted(folders))
    with watch.phase("report", "report.html and metrics.json"):
        shown = {kind: _dataset(recipes[f"held_out_{kind}"], None) for kind in EVALUATED}
        write_demo_report(demo, scores, captions, answers, shown, watch.seconds)
    metrics["seconds"] = {name: round(seconds, 1) for name, seconds in watch.seconds.items()}
    metrics["settings"] = {"size": size, "seed": seed, "steps": sizes.steps, "cores": os.cpu_count()}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"report: {output / 'report.html'}", highlight=False)
    return metrics


def _recipes(
    sizes: DemoSize, data: DemoData, encoder: Path, text_encoder: Path, output: Path, seed: int
) -> dict[str, TrainConfig]:
    """The stage-1 recipe with each split in turn as its pictures: all have features, the first is trained on."""
    return {
        name: demo_recipe(
            sizes,
            encoder=encoder,
            text_encoder=text_encoder,
            source=data.records(name),
            features=output / "features" / name,
            output=output / "run",
            seed=seed,
        )
        for name in SPLITS
    }


def _stage1(
    sizes: DemoSize, recipe: TrainConfig, datasets: dict[str, CaptionDataset], watch: Stopwatch
) -> tuple[TrainResult, dict[str, RetrievalScores]]:
    """Train, and score both held-out sets."""
    with watch.phase("train", f"{sizes.itc_steps} steps of ITC, {sizes.steps - sizes.itc_steps} of ITC + ITM + ITG"):
        result = train(recipe, resume="auto")
    with watch.phase("evaluate", "held-out concepts and held-out scenes, ITC alone and re-ranked by ITM"):
        model = load_model(result.model).stage1()
        with autocast("cpu"):
            scores = {kind: _rerank_as_validated(model, datasets, kind, sizes.rerank) for kind in EVALUATED}
    return result, scores


def _finetune(
    sizes: DemoSize, recipes: tuple[TrainConfig, TrainConfig], datasets: dict[str, CaptionDataset], watch: Stopwatch
) -> RetrievalScores:
    """Fine-tune for retrieval, and score the held-out scenes once more."""
    in_order, both_ways = recipes
    steps = f"{in_order.steps} steps of ITC on captions in order, {both_ways.steps} of ITC + ITM on captions both ways"
    with watch.phase("finetune", steps):
        train(in_order, resume="auto")
        result = train(both_ways, resume="auto")
    with watch.phase("evaluate_finetuned", "held-out scenes, ITC alone and re-ranked by ITM"):
        model = load_model(result.model).stage1()
        with autocast("cpu"):
            return _rerank_as_validated(model, datasets, "scenes", sizes.rerank)


def _rerank_as_validated(model: Stage1Model, datasets: dict[str, CaptionDataset], kind: str, k: int) -> RetrievalScores:
    """A held-out set re-ranked with the weight of ITM that is best on the validation set of its kind."""
    weight = best_itm_weight(model, datasets[f"validation_{kind}"], k)
    return score_retrieval(model, datasets[f"held_out_{kind}"], Reranking(k, "itm+itc/temperature", itm_weight=weight))


def _stage2(recipe: TrainConfig, scenes: CaptionDataset, data: DemoData, watch: Stopwatch) -> DemoCaptions:
    """Train the visual prompts of the frozen language model, and caption the held-out scenes."""
    with watch.phase("train_captioner", f"{recipe.steps} steps of stage 2 with a frozen language model"):
        result = train(recipe, resume="auto")
    with watch.phase("caption", "held-out scenes, each also by another scene's visual prompts"):
        rows = [json.loads(line) for line in data.records("held_out_scenes").read_text(encoding="utf-8").splitlines()]
        return caption_held_out_scenes(result, scenes, [[thing["name"] for thing in row["objects"]] for row in rows])


def _vqa(sizes: DemoSize, stage1: TrainConfig, language_model: Path, folder: Path, watch: Stopwatch) -> DemoAnswers:
    """easy-VQA by the Q-Former that reads the question and by its controls, each trained alike."""
    with watch.phase("questions", "easy-VQA, from its package"):
        prepare_questions(folder, sizes)
    answers = {}
    for arm in ARMS:
        with watch.phase(training_phase(arm), f"{sizes.vqa_steps} steps on questions, {ARMS[arm].title}"):
            recipe = train_arm(folder, sizes, stage1, language_model, arm)
        with watch.phase(f"answer_vqa_{arm}", "the test set's questions"):
            answers[arm] = answer_arm(folder, recipe, arm)
    return gather_answers(folder, answers)


def _caption_t5(
    sources: tuple[Path, ...], vocabulary: Path, output: Path, seed: int, steps: int, watch: Stopwatch
) -> Path:
    """The demo's own encoder-decoder, taught the training captions."""
    from qformers.demo.small_t5 import caption_t5_folder

    with watch.phase("language_model", "a small T5 learns the training captions, then is frozen"):
        lines = [line for source in sources for line in source.read_text(encoding="utf-8").splitlines()]
        captions = [caption for line in lines for caption in json.loads(line)["captions"]]
        return caption_t5_folder(captions, vocabulary, output / "t5", seed, steps)


def _dataset(recipe: TrainConfig, store: FeatureStore | None) -> CaptionDataset:
    """The split in evaluation order, each picture its own, with its features or as pictures."""
    tokenizer = CaptionTokenizer.from_pretrained(recipe.model.text_encoder, recipe.data.max_text_tokens)
    records = open_source(replace(recipe.data.train[0], id_column="image_id"))
    return CaptionDataset(records, tokenizer, recipe.data.transform, train=False, features=store)


def _ridge(
    datasets: dict[str, CaptionDataset], stores: dict[str, FeatureStore], text_encoder: Path
) -> dict[str, Tensor]:
    """Ridge similarities of the held-out sets; the penalty, and which kinds of training pictures to fit on, are
    chosen on the validation set of the same kind."""
    sets = {name: _retrieval_set(datasets[name], stores[name], text_encoder) for name in datasets}
    kinds = datasets["train"].table["kind"]
    train = sets["train"]
    parts = [
        train.subset(torch.tensor([kind in chosen for kind in kinds]))
        for chosen in (("concept",), ("concept", "single"), ("scene",), ("concept", "single", "scene"))
    ]
    similarities = {}
    for kind in EVALUATED:
        ridge = fit_best_ridge(parts, sets[f"validation_{kind}"])
        held_out = sets[f"held_out_{kind}"]
        similarities[kind] = ridge_similarities(ridge, held_out.image_features, held_out.text_embeds)
    return similarities


def _retrieval_set(dataset: CaptionDataset, store: FeatureStore, text_encoder: Path) -> RetrievalSet:
    """What the ridge baseline reads: pooled features, sentence embeddings, who belongs to whom."""
    captions = dataset.captions()
    pooled = torch.cat([pool_patches(store.read(int(row))[None]) for row in dataset.first_records])
    with autocast("cpu"):  # in the precision that the Q-Former reads the same texts in
        embeddings = embed_sentences(captions.texts, text_encoder)
    return RetrievalSet(pooled, embeddings, torch.from_numpy(captions.text_to_image))


def _table(scores: RetrievalScores, ridge: Tensor) -> dict[str, Any]:
    """One held-out set: every method's recalls on the same candidates."""
    assert scores.how is not None, "the demo re-ranks"
    return {
        "candidates": len(scores.texts),
        "qformer": scores.metrics(),
        "qformer_reranked": scores.reranked_metrics(),
        "itm_weight": scores.how.itm_weight,
        "ridge": retrieval_metrics(ridge, scores.text_to_image),
        "chance": chance_metrics(scores.itc.shape[0], scores.text_to_image),
    }
