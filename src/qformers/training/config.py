"""Every setting of a training run. Light: the command line builds its options and its help from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qformers.data.config import AnswersAs, SourceConfig, TransformConfig
from qformers.errors import ConfigError
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.objectives.config import Stage1LossConfig


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions to learn from, and how they become batches."""

    train: list[SourceConfig]
    """One or more sources, read as one. Equal image ids are the same picture, across sources too."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Sources whose losses are measured every `evaluate_every_steps`."""
    shuffle_buffer: int = 10_000
    """Of streamed sources: their shards are shuffled, and a record comes by up to so many places sooner or later."""
    mix_by: Literal["rows", "batches"] = "rows"
    """Of sources with weights. rows: every batch has some of each; batches: each batch is of one source, as in
    LAVIS, which draws it where here they take turns by weight. Pairs are then contrasted with their like alone."""
    together_column: str | None = None
    """Records that share this column's value stay side by side when an epoch is shuffled, and so meet in a batch: wrong
    pictures known to be hard, such as a scene and its mirror image, or the shots of one film. Without a value a record
    is alone. Not of streamed sources."""
    features: str | None = None
    """Folder of a feature store made by `qformers data features` for `train`: the encoder is then not run."""
    feature_views: int = 4
    """Views of each picture in the store: the evaluation transform, and otherwise random training crops."""
    feature_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """How the store keeps them: int8 takes half the space, with one scale a patch; `qformers data features` says how
    far that is from the encoder's output."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """Size, crop, flip and normalisation of the pictures."""
    batch_size: int = 2320
    """Pairs that ITC contrasts with each other, over all processes together. The paper's for ViT-L."""
    workers: int = 4
    """Loading processes per training process; 0 loads between the steps."""
    max_text_tokens: int = 32
    """Longer captions are cut (LAVIS; the paper gives none)."""
    max_broken_fraction: float = 0.01
    """Stop when more than this share of the pictures cannot be read."""
    answers_as: AnswersAs = "sampled"
    """Questions: which of the answers that people gave are learned each time. sampled: one, drawn from all of them;
    weighted: each distinct one, its loss weighted by the share of people who gave it."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError(
                "data.train names no source: give at least one, e.g. --data.train '[{path: pairs.jsonl}]'"
            )
        weighted = sum(source.weight is not None for source in self.train)
        if 0 < weighted < len(self.train):
            raise ConfigError(
                f"data.train: {weighted} of {len(self.train)} sources have a weight: give all of them one, or none"
            )
        if self.mix_by == "batches" and not weighted:
            raise ConfigError("data.mix_by is batches: sources take turns by their weights, give each one")
        if self.together_column is not None and any(source.stream for source in self.train):
            raise ConfigError(
                "data.together_column: records of streamed sources cannot be kept together; leave out stream, or the "
                "column"
            )
        _at_least("data.shuffle_buffer", self.shuffle_buffer, 0)
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.feature_views", self.feature_views, 1)
        _at_least("data.workers", self.workers, 0)
        _at_least("data.max_text_tokens", self.max_text_tokens, 3)
        _within("data.max_broken_fraction", self.max_broken_fraction, 0.0, 1.0)


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, linear warm-up, cosine to a floor (paper, section 3.4)."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Where the cosine ends. LAVIS's; the paper gives a floor for stage 2 only (5e-5)."""
    pretrained_lr_scale: float = 1.0
    """Share of the rate at which weights that came from the BERT learn. The paper trains all alike, and in stage 1 a
    share of 0.1 keeps ITM and ITG from learning; a short stage 2, whose projection is new, may want 0.2."""
    text_lr_scale: float = 1.0
    """Share of that again for those of them that only texts pass through: embeddings and the text's own layers. The
    paper trains all alike; a run on few captions keeps more of the words that it never sees with 0.1."""
    shared_lr_scale: float = 1.0
    """The same for those that texts and queries share, the self-attention. With both small, only the queries' own
    layers learn fast, and words stay where the BERT had them."""
    vision_layer_decay: float = 1.0
    """Each layer of a trained image encoder learns at this times the rate of the layer above it (BEiT's layer-wise
    decay); the paper: 0.9 to 1 by model and task."""
    betas: tuple[float, float] = (0.9, 0.98)
    """LAVIS: (0.9, 0.999)."""
    weight_decay: float = 0.05
    """On weight matrices only, see `optimiser.decay_groups`."""
    warmup_steps: int = 2000
    """From 0 to `lr`. LAVIS: 5000, from 1e-6."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together; longer ones are scaled down to it. Not in the paper."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise ConfigError(
                f"optimiser.min_lr {self.min_lr} and lr {self.lr}: needed is 0 <= min_lr <= lr and 0 < lr, "
                "or the schedule would not fall"
            )
        for number, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ConfigError(f"optimiser.betas[{number}] is {beta}: must be at least 0 and below 1")
        _at_least("optimiser.weight_decay", self.weight_decay, 0)
        _at_least("optimiser.pretrained_lr_scale", self.pretrained_lr_scale, 0)
        _at_least("optimiser.text_lr_scale", self.text_lr_scale, 0)
        _at_least("optimiser.shared_lr_scale", self.shared_lr_scale, 0)
        _within("optimiser.vision_layer_decay", self.vision_layer_decay, 0.0, 1.0)
        _at_least("optimiser.warmup_steps", self.warmup_steps, 0)
        if self.clip_norm <= 0:
            raise ConfigError(f"optimiser.clip_norm is {self.clip_norm}: must be above 0, or no step would move")


@dataclass(frozen=True)
class TrainConfig:
    """One run of either stage, whole: `train(config)` needs nothing else, and the run folder keeps a copy."""

    output: str
    """Run folder: config, log, metrics, checkpoints and at the end the model."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    stage: Literal[1, 2] = 1
    """1: ITC + ITM + ITG, no language model. 2: visual prompts of the frozen language model of `language`."""
    task: Literal["captioning", "vqa"] = "captioning"
    """Stage 2: say captions of pictures, or answer questions about them, which the sources then are (docs/vqa.md)."""
    start: str | None = None
    """The run or saved model that goes on. Stage 1, to fine-tune for retrieval: of stage 1, whole. Stage 2: of stage 1
    or 2, its image encoder and Q-Former; of another `model.bridge` none, or one of stage 2 with that bridge."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Stage 2: the language model. Its path may be left out when `start` is of stage 2 and has one."""
    objectives: Stage1LossConfig = field(default_factory=Stage1LossConfig)
    """Stage 1: the three losses. Stage 2 has one, which needs no setting."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    seed: int = 0
    """Decides the fresh weights, the order of the data, crops, dropout and negatives."""
    steps: int = 250_000
    """Optimiser steps of the whole run, resumed parts included."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the arithmetic; trained weights are kept in fp32. auto: bf16 where the machine multiplies it in hardware, else
    fp32. fp16 (the paper's) scales the loss."""
    accumulation_steps: int = 1
    """Batches whose gradients are averaged into one step. ITC and ITM contrast within each batch only."""
    micro_batch_size: int | None = None
    """Pairs that a process works through at a time; default: all of its share of a batch. Memory follows it and the
    gradients do not depend on it: ITC contrasts the whole batch still (gradient caching, at one more forward pass)."""
    checkpoint_layers: bool = False
    """Compute the Q-Former's blocks and the language model's layers a second time in the backward pass instead of
    keeping what they computed. The image encoder has model.checkpoint_vision_encoder."""
    shard_frozen_models: bool = False
    """Keep only a share of the frozen image encoder and language model on each process (FSDP2)."""
    compile: bool = False
    """Have torch.compile make code of the Q-Former: minutes at the start, then faster steps. Needs a C++ compiler."""
    timeout_seconds: float = 600.0
    """A process that does not answer the others for so long ends the run, which names it. Longer than one process
    alone ever works, the main one while it saves for example."""
    log_every_steps: int = 50
    """Rows of metrics; the loss is read from the device only then."""
    checkpoint_every_steps: int = 1000
    """A killed run repeats at most this many steps."""
    keep_checkpoints: int = 3
    """Older ones are removed, but for the one of the lowest validation loss."""
    evaluate_every_steps: int = 5000
    """How often to measure the losses on `data.validation`, if there is one."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "accumulation_steps",
            "log_every_steps",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "evaluate_every_steps",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if self.micro_batch_size is not None:
            _at_least("micro_batch_size", self.micro_batch_size, 1)
        if self.timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds is {self.timeout_seconds}: processes wait for each other, so above 0")
        if self.precision not in ("auto", "bf16", "fp16", "fp32"):
            raise ConfigError(f"precision is {self.precision!r}: must be auto, bf16, fp16 or fp32")
        if self.shard_frozen_models and self.language.quantization != "none":
            raise ConfigError(
                f"shard_frozen_models and language.quantization {self.language.quantization}: quantised weights cannot "
                "be sharded; choose one"
            )
        if self.stage not in (1, 2):
            raise ConfigError(f"stage is {self.stage!r}: must be 1 or 2")
        if self.stage == 1 and self.language.path is not None:
            raise ConfigError("language.path belongs to stage 2: set stage to 2, or leave it out")
        self._check_bridge()
        if self.stage == 2 and self.start is None and self.model.bridge == "qformer":
            raise ConfigError("stage 2 needs start: the stage-1 run whose Q-Former goes on, e.g. --start runs/stage1")
        if self.task not in ("captioning", "vqa"):
            raise ConfigError(f"task is {self.task!r}: must be captioning or vqa")
        if self.task == "vqa" and self.stage != 2:
            raise ConfigError("task vqa belongs to stage 2: set stage to 2")
        if self.task == "captioning" and self.language.qformer_reads in ("question", "empty"):
            raise ConfigError(
                f"language.qformer_reads is {self.language.qformer_reads} and task is captioning, which asks none: "
                "set task to vqa"
            )
        if self.model.train_vision_encoder and self.data.features is not None:
            raise ConfigError(
                "data.features holds a frozen image encoder's output and model.train_vision_encoder is set: "
                "choose one, or the encoder would never be trained"
            )
        if self.optimiser.warmup_steps >= self.steps:
            raise ConfigError(
                f"optimiser.warmup_steps is {self.optimiser.warmup_steps} and steps is {self.steps}: "
                "the run would end before the learning rate has reached its peak"
            )

    def _check_bridge(self) -> None:
        bridge = self.model.bridge
        if bridge == "qformer":
            return
        if self.stage == 1:
            raise ConfigError(f"model.bridge is {bridge} and stage 1: only a Q-Former has a stage 1; set stage to 2")
        if self.language.reads_instructions:
            raise ConfigError(
                f"model.bridge is {bridge} and language.qformer_reads {self.language.qformer_reads}: only a Q-Former "
                "reads text; set it to nothing"
            )
        if self.task == "vqa":
            raise ConfigError(
                f"model.bridge is {bridge} and task vqa: questions are for a Q-Former; set bridge to qformer"
            )
        if self.start is None and self.language.path is None:
            raise ConfigError("stage 2 needs language.path: there is no start that has a language model")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}: must be at least {least}")


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}: must be between {least} and {most}")
