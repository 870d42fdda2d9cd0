"""Everything a run needs before its first step, built from its config."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from qformers.data.config import SourceConfig
from qformers.data.dataset import CaptionDataset, Records, collate
from qformers.data.features import FeatureKey, FeatureStore, records_fingerprint
from qformers.data.language_text import LanguageTokenizer
from qformers.data.question_dataset import QuestionDataset, pictures_of
from qformers.data.questions import open_questions
from qformers.data.shards import RecordList, ShardRecords
from qformers.data.sources import find_column, open_source
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import TransformConfig, transform_for
from qformers.errors import ConfigError
from qformers.models.card import Provenance, without_secrets
from qformers.models.freezing import frozen_parts
from qformers.models.language import build_language_model, is_encoder_decoder
from qformers.models.presets import build_bridged, build_stage1, build_stage2, preset_shape
from qformers.models.reader import ImageReader
from qformers.models.saving import (
    LANGUAGE_FOLDER,
    LANGUAGE_TOKENIZER_FOLDER,
    SavedLanguage,
)
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model
from qformers.models.starting import start_from, started_language, started_shape
from qformers.models.vision import VisionEncoder, build_vision_encoder
from qformers.objectives.answers import AnswerObjective
from qformers.objectives.lm import Stage2Objective
from qformers.objectives.output import patch_embeds_of
from qformers.objectives.stage1 import Stage1Objective
from qformers.precision import precision_dtype
from qformers.training.checkpoint import load_checkpoint, newest_checkpoint
from qformers.training.config import TrainConfig
from qformers.training.optimiser import build_optimiser
from qformers.training.scaling import (
    LossScaler,
    compile_layers,
    leave_out_frozen,
    recompute_layers,
    shard_frozen_models,
)

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
STANDARDISING_PICTURES = 128  # some ten thousand patches: enough for a mean and a spread of each dimension

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run, on their device. `objective` is the model with its losses, made distributed."""

    model: Stage1Model | Stage2Model
    objective: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: LossScaler
    tokenizer: CaptionTokenizer | None  # of the Q-Former's texts; of another bridge none
    language: SavedLanguage | None
    train_data: CaptionDataset | QuestionDataset
    validation_data: CaptionDataset | QuestionDataset | None
    first_step: int

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def find_checkpoint(output: Path, resume: str | None) -> Path | None:
    """The newest whole checkpoint of `output` when `resume` is "auto"; None to start afresh.

    Raises:
        ConfigError: `output` holds something and resuming was not asked for.
    """
    if resume not in (None, "auto"):
        raise ConfigError(f"--resume is {resume!r}: the only choice is auto")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: give a folder as --output")
    if not output.exists() or not any(output.iterdir()):
        return None
    if resume is None:
        raise ConfigError(f"{output} already holds a run; use --resume auto or another --output")
    return newest_checkpoint(output / CHECKPOINTS)


def build_run(config: TrainConfig, checkpoint: Path | None, accelerator: Accelerator) -> Run:
    """Data, model and optimiser of `config`, filled from `checkpoint` if there is one.

    Raises:
        ConfigError, DataError, CheckpointError: the settings, the data or the checkpoint do not fit together.
    """
    tokenizer = None
    if config.model.bridge == "qformer":
        tokenizer = CaptionTokenizer.from_pretrained(config.model.text_encoder, config.data.max_text_tokens)
    encoder = build_encoder(config)
    torch.manual_seed(config.seed)
    objective, captions, language = (
        _stage1(config, tokenizer, encoder)
        if config.stage == 1 and tokenizer is not None
        else _stage2(config, tokenizer, encoder)
    )
    records = open_sources(config, config.data.train, config.data.together_column)
    store = None
    if config.data.features is not None:
        store = FeatureStore.open(config.data.features, feature_key(config, encoder, stored_pictures(config, records)))
    transform = transform_for(encoder, config.data.transform)
    data = partial(_dataset, config, captions, tokenizer, transform)
    train_data = data(records, train=True, features=store)
    validation_data = None
    if config.data.validation:
        validation_data = data(open_sources(config, config.data.validation), train=False, features=None)

    if config.checkpoint_layers:
        recompute_layers(objective.model)
    if config.compile:
        compile_layers(objective.model)
    if config.shard_frozen_models:
        shard_frozen_models(objective.model, accelerator.device)
    model = objective.model.to(accelerator.device).train()
    if isinstance(train_data, CaptionDataset) and _starts_from_pictures(config, checkpoint):
        _standardise_patches(objective.model, train_data, accelerator.device)
    optimiser = build_optimiser(model, config.optimiser)
    first_step = 1 if checkpoint is None else load_checkpoint(checkpoint, model, optimiser) + 1
    leave_out_frozen(objective)
    prepared = accelerator.prepare_model(objective)
    scaler = LossScaler(config.precision == "fp16", accelerator.device, optimiser)
    return Run(model, prepared, optimiser, scaler, tokenizer, language, train_data, validation_data, first_step)


def _starts_from_pictures(config: TrainConfig, checkpoint: Path | None) -> bool:
    return config.model.standardise_patches and config.start is None and checkpoint is None


def _dataset(
    config: TrainConfig,
    words: CaptionTokenizer | LanguageTokenizer,
    tokenizer: CaptionTokenizer | None,
    transform: TransformConfig,
    records: Records,
    train: bool,
    features: FeatureStore | None,
) -> CaptionDataset | QuestionDataset:
    """What the run learns from, or is measured on."""
    if config.task == "captioning":
        return CaptionDataset(records, words, transform, train, config.seed, features)
    assert isinstance(words, LanguageTokenizer), "answers are said by a language model"
    assert isinstance(records, datasets.Dataset), "questions are a table"
    assert tokenizer is not None, "TrainConfig requires a Q-Former"
    template = config.language.question_template
    if config.language.qformer_reads == "prompt":
        raise ConfigError(
            "language.qformer_reads is prompt, which is InstructBLIP's: training reads the question alone"
        )
    return QuestionDataset(
        records,
        words,
        tokenizer,
        template,
        transform,
        train,
        answers_as=config.data.answers_as,
        seed=config.seed,
        features=features,
        shows_questions=config.language.qformer_reads != "empty",
    )


def _stage1(
    config: TrainConfig, tokenizer: CaptionTokenizer, encoder: VisionEncoder
) -> tuple[Stage1Objective, CaptionTokenizer, None]:
    """The three losses around a model, fresh or from `config.start`, and the tokenizer of its batches."""
    # A start has all weights: BERT's would be read for nothing.
    settings = config.model if config.start is None else replace(config.model, start_from_text_encoder=False)
    model = build_stage1(settings, tokenizer.vocab_size, encoder)
    if config.start is not None:
        start_from(model, config.start)
    return Stage1Objective(model, config.objectives), tokenizer, None


def _stage2(
    config: TrainConfig, tokenizer: CaptionTokenizer | None, encoder: VisionEncoder
) -> tuple[Stage2Objective | AnswerObjective, LanguageTokenizer, SavedLanguage]:
    """The language-modelling loss around a model that goes on from `config.start`, and what batches are made with."""
    language, inside = (
        (config.language, None) if config.start is None else started_language(config.start, config.language)
    )
    path = str(language.path if inside is None else inside / LANGUAGE_FOLDER)
    captions = LanguageTokenizer.from_pretrained(
        path if inside is None else inside / LANGUAGE_TOKENIZER_FOLDER,
        is_encoder_decoder=is_encoder_decoder(path),
        prompt=language.prompt,
        max_tokens=config.data.max_text_tokens,
        end_token=language.end_token,
        split_captions=language.split_captions,
    )
    speaker = build_language_model(replace(language, path=path), captions.end_id, captions.pad_id)
    if {speaker.dtype, precision_dtype(config.precision)} == {torch.float16, torch.bfloat16}:
        raise ConfigError(
            f"precision is {config.precision} and the language model is {str(speaker.dtype).removeprefix('torch.')}: "
            "torch mixes no two halves; give precision and language.dtype the same, or one of them fp32 "
            "(a CPU reads float16 as bfloat16)"
        )
    prompt_ids, _ = captions.encode_prompts([language.prompt])
    speaker.check_context(config.model.num_queries + prompt_ids.shape[1] + config.data.max_text_tokens)
    if tokenizer is None:
        model = build_bridged(config.model, encoder, speaker)
    else:
        assert config.start is not None, "TrainConfig requires it of a Q-Former"
        shape = started_shape(config.start, preset_shape(config.model.preset), language.qformer_reads)
        model = build_stage2(config.model, tokenizer.vocab_size, encoder, speaker, shape, language.reads_instructions)
    if config.start is not None:
        start_from(model, config.start)
    objective = Stage2Objective(model) if config.task == "captioning" else AnswerObjective(model)
    return objective, captions, SavedLanguage(language, captions)


@torch.no_grad()
def _standardise_patches(model: ImageReader, dataset: CaptionDataset, device: torch.device) -> None:
    """Show the model some of the training pictures, evenly spread, before it learns from any."""
    pictures = dataset.images()
    chosen = torch.linspace(0, len(pictures) - 1, min(STANDARDISING_PICTURES, len(pictures))).round().int().tolist()
    batch = collate([pictures[position] for position in chosen]).to(device)
    if len(batch):  # none can be read: training says so, and names them
        model.standardise_patches(patch_embeds_of(batch, model))


def build_encoder(config: TrainConfig) -> VisionEncoder:
    """The image encoder: frozen, in the run's precision (it needs no master weights); trained, in float32."""
    return build_vision_encoder(
        config.model.vision_encoder,
        layer=config.model.vision_layer,
        image_px=config.data.transform.image_px,
        dtype=torch.float32 if config.model.train_vision_encoder else precision_dtype(config.precision),
    )


def open_sources(config: TrainConfig, sources: list[SourceConfig], together: str | None = None) -> Records:
    """The records of all sources, one after another: pictures with captions, or questions, as the task is.

    Equal image ids are one picture, across sources too. The column `together` is kept; DataError if a source has none.
    """
    if config.task == "vqa":
        return datasets.concatenate_datasets([open_questions(source).records for source in sources])
    opened = [ShardRecords.open(source) if source.stream else _table(source, together) for source in sources]
    tables = [source for source in opened if isinstance(source, datasets.Dataset)]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights or len(tables) < len(opened):
        return RecordList(opened, weights)
    return datasets.concatenate_datasets(tables)


def _table(source: SourceConfig, together: str | None) -> datasets.Dataset:
    columns = ["image", "captions", "image_id", "name"]
    table = open_source(source)
    if together is not None:
        columns.append(find_column(table.column_names, together, "", "data.together_column", source.path))
    return table.select_columns(columns)


def stored_pictures(config: TrainConfig, records: Records) -> Records:
    """The pictures of a feature store: one for each record, or for all questions about a picture together."""
    if config.task == "captioning":
        return records
    assert isinstance(records, datasets.Dataset), "questions are a table"
    return pictures_of(records)


def feature_key(config: TrainConfig, encoder: VisionEncoder, records: Records) -> FeatureKey:
    """What precomputed features of `records` depend on; a store with another key is refused."""
    return FeatureKey(
        encoder=encoder.fingerprint(),
        layer=encoder.layer,
        image_px=encoder.image_px,
        transform=asdict(transform_for(encoder, config.data.transform)),
        views=config.data.feature_views,
        records=records_fingerprint(cast(Iterable[Mapping[str, Any]], records)),
        dtype=config.data.feature_dtype,
    )


def announce(config: TrainConfig, run: Run, accelerator: Accelerator) -> None:
    """Log what is trained on what and from which step, and keep the resolved config beside the run.

    When a run goes on with other settings than before, each is named in a warning.
    """
    if not accelerator.is_main_process:
        return
    path = Path(config.output) / CONFIG_FILE
    settings = _plain(config)
    if path.exists():
        before, now = flat_settings(yaml.safe_load(path.read_text(encoding="utf-8"))), flat_settings(settings)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                logger.warning("%s was %s and is now %s", name, before.get(name), now.get(name))
    path.write_text(_as_yaml(settings), encoding="utf-8")
    frozen = ", ".join(f"{name}, {count:,}" for name, count in frozen_parts(run.model).items())
    logger.info(
        "training %s parameters (frozen: %s) on %d %s, %s, %d process(es) on %s, steps %d to %d",
        f"{sum(parameter.numel() for parameter in run.trained):,}",
        frozen,
        len(run.train_data),
        "pictures" if config.task == "captioning" else "questions",
        str(precision_dtype(config.precision)).removeprefix("torch."),
        accelerator.num_processes,
        accelerator.device.type,
        run.first_step,
        config.steps,
    )


def provenance(config: TrainConfig, run: Run, metrics: Mapping[str, float]) -> Provenance:
    """What the card of the finished model says of its data, its recipe and its metrics."""
    return Provenance(
        sources=[without_secrets(source.path) for source in config.data.train],
        pictures=len(run.train_data),
        recipe=without_secrets(_as_yaml(_plain(config))),
        metrics=metrics,
    )


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _as_yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table: {"data": {"workers": 4}} becomes {"data.workers": 4}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
