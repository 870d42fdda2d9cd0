"""A finished model as a folder: config.json, model.safetensors (frozen encoder included), tokenizer, model card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from qformers.errors import CheckpointError
from qformers.models.card import Provenance, model_card
from qformers.models.config import Dtype, LanguageConfig, ModelConfig
from qformers.models.language import LanguageModel, build_language_model
from qformers.models.presets import (
    VISION_NORM_EPS,
    QFormerShape,
    build_bridged,
    build_stage1,
    build_stage2,
    preset_shape,
    shape_of,
)
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import BridgedModel, Stage2Model
from qformers.models.tensors import WEIGHTS_FILE, Tensors, open_tensors
from qformers.models.vision import VisionEncoder, quiet_loading
from qformers.version import __version__

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
CARD_FILE = "README.md"
FORMATS = {1: "qformers-stage1", 2: "qformers-stage2"}
LANGUAGE_FOLDER = "language_model"
LANGUAGE_TOKENIZER_FOLDER = "language_tokenizer"
LANGUAGE_PREFIX = "language_model."
INSTRUCTBLIP_TEMPLATE = "Question: {} Short answer:"  # arXiv 2305.06500, appendix: how it was asked on VQAv2

logger = logging.getLogger(__name__)


@runtime_checkable
class SavesItself(Protocol):
    """Anything that writes its files into a folder: the tokenizer, which lives in another layer."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class SavedLanguage:
    """What a stage-2 model's folder says of its language model beside the weights."""

    config: LanguageConfig
    tokenizer: SavesItself | None


@dataclass(frozen=True)
class LoadedModel:
    """A model read back, in eval mode on the CPU, the config it was built from, and what it was read from.

    `tokenizer` (of the Q-Former's text branch) and `language_tokenizer` are folders; None where the source has none.
    """

    model: Stage1Model | Stage2Model
    config: ModelConfig
    language: LanguageConfig | None
    folder: Path
    tokenizer: Path | None
    language_tokenizer: Path | None

    def stage1(self) -> Stage1Model:
        """The model, if it is of stage 1. Raises CheckpointError otherwise."""
        if not isinstance(self.model, Stage1Model):
            raise CheckpointError(
                f"{self.folder}: a stage-2 model has no ITC and ITM heads: give the stage-1 run it started from"
            )
        return self.model

    def stage2(self) -> tuple[Stage2Model, LanguageConfig]:
        """The model and its language model's settings, if it is of stage 2. Raises CheckpointError otherwise."""
        if not isinstance(self.model, Stage2Model) or self.language is None:
            raise CheckpointError(
                f"{self.folder}: a stage-1 model has no language model: train stage 2 from it "
                "(recipes/stage2_decoder.yaml)"
            )
        return self.model, self.language


def save_model(
    model: Stage1Model | Stage2Model,
    config: ModelConfig,
    tokenizer: SavesItself | None,
    folder: Path,
    language: SavedLanguage | None = None,
    whole_state: Mapping[str, Tensor] | None = None,
    provenance: Provenance | None = None,
    card: str | None = None,
) -> None:
    """Write a folder that `load_model` reads back bit for bit, frozen models included. An older one is replaced.

    Args:
        whole_state: the model's state, where `model` holds only a share of it (FSDP).
        provenance: what the model card is to say of data, recipe and metrics.
        card: a card that the model has already (`own_card`), instead of a new one.

    Raises:
        CheckpointError: it could not be written; an older folder is then left as it was.
    """
    unfinished = folder.with_name(f".unfinished_{folder.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state = model.state_dict() if whole_state is None else whole_state
        own = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(LANGUAGE_PREFIX)}
        save_file(own, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        spoken = None if language is None else language.config
        if isinstance(model, Stage2Model):
            inside = f"{LANGUAGE_PREFIX}model."
            speaker = {name.removeprefix(inside): tensor for name, tensor in state.items() if name.startswith(inside)}
            with quiet_loading():
                model.language_model.model.save_pretrained(unfinished / LANGUAGE_FOLDER, state_dict=speaker)
        if language is not None and language.tokenizer is not None:
            language.tokenizer.save(unfinished / LANGUAGE_TOKENIZER_FOLDER)
        if tokenizer is not None:
            tokenizer.save(unfinished / TOKENIZER_FOLDER)
        card = card or model_card(model, config, spoken, provenance)
        write_description(unfinished, describe_model(model, config, spoken), card)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{folder}: the model could not be saved ({error}): free some space") from error


def own_card(folder: Path) -> str | None:
    """The card of a model of ours in `folder`, which goes along when it is written again; None of anything else."""
    try:
        read_description(folder)
        return (folder / CARD_FILE).read_text(encoding="utf-8")
    except (CheckpointError, OSError):
        return None


def load_model(folder: str | Path, dtype: Dtype = "auto") -> LoadedModel:
    """The model that `save_model` wrote, of either stage.

    Args:
        dtype: of the language model's weights, as in `LanguageConfig`.

    Raises:
        CheckpointError: no such folder, damaged files, or weights of another shape than config.json says.
    """
    folder = model_folder(folder)
    description = read_description(folder)
    speaker = None
    if (settings := description.get("language")) is not None:
        # Already quantised weights say so themselves.
        stored = LanguageConfig(path=str(folder / LANGUAGE_FOLDER), dtype=dtype)
        speaker = build_language_model(stored, settings["end_id"], settings["pad_id"])
    return load_described(description, open_tensors(folder), speaker, folder, *tokenizer_folders(folder))


def tokenizer_folders(folder: Path) -> tuple[Path | None, Path | None]:
    """Those of the Q-Former's and of the language model's tokenizer in a saved model, where it has them."""
    inside = (folder / TOKENIZER_FOLDER, folder / LANGUAGE_TOKENIZER_FOLDER)
    return inside[0] if inside[0].is_dir() else None, inside[1] if inside[1].is_dir() else None


def load_described(
    description: dict[str, Any],
    tensors: Tensors,
    speaker: LanguageModel | None,
    source: Path,
    tokenizer: Path | None,
    language_tokenizer: Path | None,
) -> LoadedModel:
    """The model that `description` says, filled with `tensors`, around `speaker`.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape than the description says.
    """
    try:
        model = build_described(description, speaker)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source / CONFIG_FILE}: written by another version ({error})") from error
    _fill(model, tensors, source)
    return LoadedModel(
        model.eval(),
        ModelConfig(**description["model"]),
        language_config(description),
        source,
        tokenizer,
        language_tokenizer,
    )


def describe_model(
    model: Stage1Model | Stage2Model, config: ModelConfig, language: LanguageConfig | None
) -> dict[str, Any]:
    """All but the weights, as plain JSON values: config.json of a saved model. `build_described` is the inverse."""
    qformer: dict[str, Any] = {}
    if not isinstance(model, BridgedModel):
        qformer = {"qformer": shape_of(model.qformer).sizes(), "vocab_size": model.qformer.vocab_size}
    description = {
        "format": FORMATS[1],
        "qformers_version": __version__,
        "model": asdict(config),
        **qformer,
        "vision": model.vision_encoder.describe(),
        "vision_norm_eps": model.vision_norm.eps,
    }
    if isinstance(model, Stage2Model):
        assert language is not None, "a stage-2 model is saved with its language model"
        ids = {"end_id": model.language_model.end_id, "pad_id": model.language_model.pad_id}
        description |= {"format": FORMATS[2], "language": asdict(language) | ids}
    return description


@no_init_weights()
def build_described(description: dict[str, Any], speaker: LanguageModel | None) -> Stage1Model | Stage2Model:
    """The model that `describe_model` describes, its weights to be filled; `speaker` is stage 2's language model."""
    config = ModelConfig(**description["model"])
    encoder = VisionEncoder.from_description(description["vision"])
    # The weights come from the file: nothing is fetched from where training started.
    unstarted = replace(config, start_from_text_encoder=False)
    # Models of the first versions are all of a preset.
    shape = QFormerShape(**description["qformer"]) if "qformer" in description else preset_shape(config.preset)
    if speaker is not None and config.bridge != "qformer":
        model = build_bridged(config, encoder, speaker)
    elif speaker is None:
        model = build_stage1(unstarted, description["vocab_size"], encoder, shape)
    else:
        instructed = reads_instructions(description)
        model = build_stage2(unstarted, description["vocab_size"], encoder, speaker, shape, instructed)
    model.vision_norm.eps = description.get("vision_norm_eps", VISION_NORM_EPS)
    return model


def language_config(description: dict[str, Any]) -> LanguageConfig | None:
    """The language model's settings of a description; None for stage 1."""
    if (settings := description.get("language")) is None:
        return None
    found = {field.name: settings[field.name] for field in fields(LanguageConfig) if field.name in settings}
    if settings.get("reads_instructions"):  # what the first versions wrote of InstructBLIP
        found |= {"qformer_reads": "prompt", "question_template": INSTRUCTBLIP_TEMPLATE}
    return LanguageConfig(**found)


def reads_instructions(description: dict[str, Any]) -> bool:
    """Whether the Q-Former of a description reads text beside the picture."""
    language = language_config(description)
    return language is not None and language.reads_instructions


def write_description(folder: Path, description: dict[str, Any], card: str) -> None:
    """config.json and the model card of a saved model."""
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def model_folder(path: str | Path) -> Path:
    """The folder of the model itself, where `path` may also be the run that made it."""
    inside = Path(path) / "model"
    return inside if (inside / CONFIG_FILE).is_file() else Path(path)


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a saved model.

    Raises:
        CheckpointError: it is not there, or not ours.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no qformers model here, config.json is missing")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if description.get("format") not in FORMATS.values():
        found = description.get("format") or description.get("model_type") or "something else"
        raise CheckpointError(
            f"{folder}: holds {found}, not a model saved by qformers ({', '.join(FORMATS.values())}): "
            "`qformers convert` makes one of BLIP-2's other formats"
        )
    return description


def _fill(model: Stage1Model | Stage2Model, tensors: Tensors, source: Path) -> None:
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(LANGUAGE_PREFIX)}
    check_fit(tensors, ours, f"{source}: its weights")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(tensors.read(name))


def check_fit(tensors: Tensors, needed: dict[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless `tensors` has the names and shapes of `needed` and no others."""
    if absent := tensors.described.keys() ^ needed.keys():
        raise CheckpointError(f"{what} do not fit its config.json ({len(absent)} tensors such as {min(absent)})")
    for name, tensor in tensors.described.items():
        if tensor.shape != needed[name].shape:
            raise CheckpointError(
                f"{what} do not fit: {name} has shape {tuple(tensor.shape)}, config.json says "
                f"{tuple(needed[name].shape)}"
            )
