"""What the demo builds, trains and measures, in one place, at three sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qformers.data.config import SourceConfig, TransformConfig
from qformers.demo.config import DemoDataConfig
from qformers.models.config import LanguageConfig, ModelConfig, QFormerReads
from qformers.objectives.config import Stage1LossConfig
from qformers.training.config import DataConfig, OptimiserConfig, TrainConfig

Size = Literal["quick", "standard", "long"]
LanguageModelName = Literal["smollm2", "t5"]
VQA_IMAGE_PX = 98


@dataclass(frozen=True)
class DemoSize:
    """How much of everything. On 2 cores without bf16 `quick` takes minutes, `standard` half an hour, `long` one."""

    data: DemoDataConfig
    steps: int
    itc_steps: int
    batch_size: int
    image_px: int
    num_queries: int
    rerank: int
    itm_fraction: float
    scenes_share: float
    in_order_steps: int
    finetuning_steps: int
    captioned_scenes_share: float
    t5_steps: int
    captioning_steps: dict[LanguageModelName, int]
    captioning_batch_size: int
    vqa_steps: int
    vqa_test_pictures: int | None


STANDARD = DemoSize(
    data=DemoDataConfig(),
    steps=530,
    itc_steps=350,
    batch_size=128,
    image_px=126,
    num_queries=8,
    rerank=16,
    itm_fraction=0.25,
    scenes_share=0.4,
    in_order_steps=450,
    finetuning_steps=330,
    captioned_scenes_share=0.75,
    t5_steps=500,
    captioning_steps={"smollm2": 400, "t5": 900},
    captioning_batch_size=32,
    vqa_steps=400,
    vqa_test_pictures=None,  # all
)
SIZES: dict[Size, DemoSize] = {
    "quick": DemoSize(
        data=DemoDataConfig(concept_views=1, scenes=300, held_out_scenes=60, validation_scenes=30, singles=0),
        steps=20,
        itc_steps=0,
        batch_size=48,
        image_px=70,
        num_queries=8,
        rerank=8,
        itm_fraction=1.0,
        scenes_share=0.4,
        in_order_steps=4,
        finetuning_steps=8,
        captioned_scenes_share=0.75,
        t5_steps=60,
        captioning_steps={"smollm2": 8, "t5": 8},
        captioning_batch_size=16,
        vqa_steps=6,
        vqa_test_pictures=10,
    ),
    "standard": STANDARD,
    "long": replace(
        STANDARD,
        steps=1600,
        itc_steps=1000,
        in_order_steps=800,
        finetuning_steps=800,
        captioning_steps={"smollm2": 1200, "t5": 1800},
        vqa_steps=800,
    ),
}


def demo_recipe(
    size: DemoSize,
    *,
    encoder: Path,
    text_encoder: Path,
    source: Path,
    features: Path,
    output: Path,
    seed: int,
) -> TrainConfig:
    """The stage-1 run of the demo: the paper's three objectives on a small frozen encoder and a small BERT.

    Deviations from the paper, all for a run of minutes instead of days: 10 × its learning rate, but a third of its for
    all that texts pass through, which keeps what the BERT knows of unseen words; pictures read in the first and the
    last block alone and texts by the mean of their tokens, which names those better; queries started as words and
    `vision_norm` from the pictures, without which the queries become alike; no dropout; one precomputed view of each
    picture; ITC alone at first, which sees more than twice as many pictures a minute; then ITM on a quarter of each
    batch with half of its negatives easy ones; and a temperature kept at 0.1, which names unseen words better too.
    """
    return TrainConfig(
        output=str(output),
        data=DataConfig(
            # All pictures of a concept share a group: their captions are no negatives of each other.
            train=[SourceConfig(path=str(source), id_column="group")],
            features=str(features),
            feature_views=1,
            # Captions say left and right, so no flips.
            transform=TransformConfig(image_px=size.image_px, flip=False),
            batch_size=size.batch_size,
            workers=0,
            max_text_tokens=14,
        ),
        model=ModelConfig(
            vision_encoder=str(encoder),
            preset="small",
            text_encoder=str(text_encoder),
            num_queries=size.num_queries,
            dropout=0.0,
            attention_dropout=0.0,
            cross_attention_frequency=5,  # of six blocks the first and the last
            text_readout="mean",
            query_start="words",
            standardise_patches=True,
        ),
        objectives=Stage1LossConfig(
            hard_negative_fraction=0.5,
            itm_fraction=size.itm_fraction,
            itc_steps=size.itc_steps,
            min_temperature=0.1,
        ),
        optimiser=OptimiserConfig(
            lr=1e-3,
            text_lr_scale=0.03,
            shared_lr_scale=0.03,
            min_lr=1e-5,
            warmup_steps=max(2, size.steps // 10),
        ),
        seed=seed,
        steps=size.steps,
        log_every_steps=5,
        checkpoint_every_steps=50,
        keep_checkpoints=1,
    )


def with_scenes(recipe: TrainConfig, things: Path, scenes: Path, share: float) -> TrainConfig:
    """The recipe with `share` of every batch scenes, the rest pictures of one thing, in the order of its features."""
    one = recipe.data.train[0]
    parts = [replace(one, path=str(things), weight=1 - share), replace(one, path=str(scenes), weight=share)]
    return replace(recipe, data=replace(recipe.data, train=parts))


def demo_finetuning_recipes(
    size: DemoSize, stage1: TrainConfig, things: Path, in_order: Path, both_ways: Path, folder: Path
) -> tuple[TrainConfig, TrainConfig]:
    """The retrieval fine-tuning of the demo: from the stage-1 run just made, nearly on scenes alone, in two runs.

    ITC alone on captions in order, then ITC and ITM on captions that name either thing first. Of two things in two
    directions neither who is named first nor the relation's word says alone what stands where: from both at once
    nothing is learned in as many steps, while what has been learned in order carries over. A scene's twin, which only
    the relation tells from it, is in the batch. All weights learn at one rate, the text's too: it has to be read
    closely.
    Deviations from the paper, for a run of minutes: the image encoder stays frozen, there is no ITG, batches are half
    as large as in stage 1, and a quarter of ITM's negatives are easy ones.
    """

    def run(name: str, start: str, scenes: Path, steps: int, itc_steps: int) -> TrainConfig:
        recipe = replace(
            stage1,
            output=str(folder / name),
            start=start,
            data=replace(stage1.data, batch_size=size.batch_size // 2, together_column="together"),
            objectives=replace(
                stage1.objectives, itc_steps=itc_steps, itm_fraction=1.0, itg=False, hard_negative_fraction=0.75
            ),
            optimiser=OptimiserConfig(lr=4e-4, min_lr=1e-5, warmup_steps=max(2, steps // 10)),
            steps=steps,
        )
        return with_scenes(recipe, things, scenes, 0.95)

    first = run("in_order", stage1.output, in_order, size.in_order_steps, itc_steps=size.in_order_steps)
    return first, run("both_ways", first.output, both_ways, size.finetuning_steps, itc_steps=0)


def demo_captioning_recipe(
    size: DemoSize, stage1: TrainConfig, *, name: LanguageModelName, language_model: Path, output: Path
) -> TrainConfig:
    """The stage-2 run of the demo: from the stage-1 run just made, on the same pictures and features.

    Deviations from the paper, for a run of minutes: a small language model, 10 × the learning rate,
    no dropout.
    """
    steps = size.captioning_steps[name]
    return replace(
        stage1,
        output=str(output),
        stage=2,
        start=stage1.output,
        # The whole caption is the target: in prefix language modelling text would say a part of it.
        language=LanguageConfig(path=str(language_model), split_captions=False),
        data=replace(stage1.data, batch_size=size.captioning_batch_size, max_text_tokens=20),
        optimiser=OptimiserConfig(lr=5e-4, min_lr=1e-5, warmup_steps=max(2, steps // 12)),
        steps=steps,
    )


def demo_vqa_recipe(
    size: DemoSize,
    stage1: TrainConfig,
    *,
    language_model: Path,
    source: Path,
    features: Path,
    output: Path,
    reads: QFormerReads,
) -> TrainConfig:
    """A question-answering run of the demo: from its stage-1 run, on easy-VQA's pictures of 64 px.

    Deviations from the paper as in `demo_captioning_recipe`, and the image encoder stays frozen.
    """
    steps = size.vqa_steps
    return replace(
        stage1,
        output=str(output),
        stage=2,
        task="vqa",
        start=stage1.output,
        language=LanguageConfig(path=str(language_model), qformer_reads=reads),
        data=replace(
            stage1.data,
            train=[SourceConfig(path=str(source))],
            features=str(features),
            transform=TransformConfig(image_px=VQA_IMAGE_PX, flip=False),
            batch_size=32,
            max_text_tokens=20,
        ),
        optimiser=OptimiserConfig(lr=1e-3, pretrained_lr_scale=0.2, min_lr=1e-5, warmup_steps=max(2, steps // 12)),
        steps=steps,
    )
