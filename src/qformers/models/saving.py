"""A finished model as a folder: config.json, model.safetensors (frozen encoder included), tokenizer, model card."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.language import build_language_model
from qformers.models.presets import build_stage1, build_stage2
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model
from qformers.models.vision import VisionEncoder, quiet_loading
from qformers.version import __version__

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"
CARD_FILE = "README.md"
FORMATS = {1: "qformers-stage1", 2: "qformers-stage2"}
LANGUAGE_FOLDER = "language_model"
LANGUAGE_TOKENIZER_FOLDER = "language_tokenizer"
LANGUAGE_PREFIX = "language_model."

logger = logging.getLogger(__name__)


@runtime_checkable
class SavesItself(Protocol):
    """Anything that writes its files into a folder: the tokenizer, which lives in another layer."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class SavedLanguage:
    """What a stage-2 model's folder says of its language model beside the weights."""

    config: LanguageConfig
    tokenizer: SavesItself


@dataclass(frozen=True)
class LoadedModel:
    """A model read back, in eval mode on the CPU, the config it was built from, and its folder."""

    model: Stage1Model | Stage2Model
    config: ModelConfig
    language: LanguageConfig | None
    folder: Path

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
    tokenizer: SavesItself,
    folder: Path,
    language: SavedLanguage | None = None,
) -> None:
    """Write a folder that `load_model` reads back bit for bit, frozen models included. An older one is replaced.

    Raises:
        CheckpointError: it could not be written; an older folder is then left as it was.
    """
    unfinished = folder.with_name(f".unfinished_{folder.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if not name.startswith(LANGUAGE_PREFIX)
        }
        save_file(state, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        description = {
            "format": FORMATS[1],
            "qformers_version": __version__,
            "model": asdict(config),
            "vocab_size": model.qformer.text_embeddings.word.num_embeddings,
            "vision": model.vision_encoder.describe(),
        }
        if isinstance(model, Stage2Model):
            assert language is not None, "a stage-2 model is saved with its language model"
            spoken = model.language_model
            described = asdict(language.config) | {"end_id": spoken.end_id, "pad_id": spoken.pad_id}
            description |= {"format": FORMATS[2], "language": described}
            with quiet_loading():
                spoken.model.save_pretrained(unfinished / LANGUAGE_FOLDER)
            language.tokenizer.save(unfinished / LANGUAGE_TOKENIZER_FOLDER)
        (unfinished / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(unfinished / TOKENIZER_FOLDER)
        (unfinished / CARD_FILE).write_text(model_card(model, config, language), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{folder}: the model could not be saved ({error}): free some space") from error


def load_model(folder: str | Path) -> LoadedModel:
    """The model that `save_model` wrote, of either stage.

    Raises:
        CheckpointError: no such folder, damaged files, or weights of another shape than config.json says.
    """
    folder = model_folder(folder)
    description = read_description(folder)
    language = None
    try:
        config = ModelConfig(**description["model"])
        encoder = VisionEncoder.from_description(description["vision"])
        # The weights come from the file: nothing is fetched from where training started.
        unstarted = replace(config, start_from_text_encoder=False)
        if description["format"] == FORMATS[1]:
            model = build_stage1(unstarted, description["vocab_size"], encoder)
        else:
            settings = dict(description["language"])
            end_id, pad_id = settings.pop("end_id"), settings.pop("pad_id")
            language = LanguageConfig(**settings)
            # Already quantised weights say so themselves.
            stored = LanguageConfig(path=str(folder / LANGUAGE_FOLDER))
            model = build_stage2(
                unstarted, description["vocab_size"], encoder, build_language_model(stored, end_id, pad_id)
            )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: written by another version ({error})") from error
    _fill(model, folder / WEIGHTS_FILE)
    return LoadedModel(model.eval(), config, language, folder)


def start_from(model: Stage2Model, folder: str | Path) -> None:
    """Fill `model` from the run or saved model `folder`: the image encoder, `vision_norm` and the Q-Former.

    Of a stage-1 model the heads are left out; of a stage-2 model the projection comes too, if it has this width.

    Raises:
        CheckpointError: no such model, or one with another image encoder or Q-Former; names what does not fit.
    """
    folder = model_folder(folder)
    read_description(folder)
    state = _read(folder / WEIGHTS_FILE)
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(LANGUAGE_PREFIX)}
    for name, tensor in ours.items():
        needed = not name.startswith("language_projection.")
        if name not in state and needed:
            raise CheckpointError(f"{folder}: lacks {name}, so its image encoder or Q-Former is not the recipe's")
        if name in state and state[name].shape != tensor.shape and needed:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(state[name].shape)}, the recipe's model {tuple(tensor.shape)}: "
                "set `model` as that run's config.yaml has it"
            )
    leftover = [
        name for name in state if name.startswith(("vision_encoder.", "vision_norm.", "qformer.")) and name not in ours
    ]
    if leftover:
        raise CheckpointError(
            f"{folder}: {len(leftover)} of its weights have no place in the recipe's model, first {min(leftover)}: "
            "set `model` as that run's config.yaml has it"
        )
    if any(name in state and state[name].shape != tensor.shape for name, tensor in ours.items()):
        logger.warning("%s: its projection is of another language model's width and starts afresh", folder)
    with torch.no_grad():
        for name, tensor in ours.items():
            if name in state and state[name].shape == tensor.shape:
                tensor.copy_(state[name])


def started_language(folder: str | Path, language: LanguageConfig) -> tuple[LanguageConfig, Path | None]:
    """`language` with what it leaves open taken from the stage-2 model that training goes on from.

    Returns:
        The settings, and the folder in which the language model and its tokenizer are found; None when `language`
        names another one.

    Raises:
        CheckpointError: no model there. ConfigError: no language model is named, here or there.
    """
    inside = model_folder(folder)
    described = read_description(inside).get("language")
    if language.path is not None:
        return language, None
    if described is None:
        raise ConfigError(f"language.path is not set and {folder} has no language model: name one")
    end_token = language.end_token or described["end_token"]
    return replace(language, path=described["path"], end_token=end_token), inside


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
        raise CheckpointError(f"{folder}: holds {found}, not a model saved by qformers ({', '.join(FORMATS.values())})")
    return description


def model_card(model: Stage1Model | Stage2Model, config: ModelConfig, language: SavedLanguage | None) -> str:
    """What a stranger needs to know of the folder, from the model itself."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.vision_encoder.parameters())
    encoder = model.vision_encoder
    if isinstance(model, Stage2Model):
        assert language is not None
        stage, can = 2, "captions through a frozen language model"
        name, prompt = Path(language.config.path or "").name, language.config.prompt
        spoken = sum(parameter.numel() for parameter in model.language_model.parameters())
        speaks = f"- Language model: `{name}`, frozen, {spoken:,} parameters, prompt {prompt!r}.\n"
        example = 'model.caption(["picture.jpg"])'
    else:
        stage, can = 1, "ITC similarity, ITM match score, ITG captions"
        speaks = "- No language model.\n"
        example = 'model.itc(["picture.jpg"], ["a poodle", "a canoe"])'
    return f"""# A Q-Former, stage {stage}

Image-text model of the BLIP-2 kind (arXiv 2301.12597): {can}.

- Image encoder: `{Path(config.vision_encoder).name}`, layer {encoder.layer}, {encoder.image_px} px,
  {"trained" if config.train_vision_encoder else "frozen"}, {frozen:,} parameters.
- Q-Former: preset `{config.preset}`, {config.num_queries} queries; {trained:,} trained parameters in all.
- Text: started from `{Path(config.text_encoder).name}`.
{speaks}
```python
import qformers

model = qformers.load("this/folder")
{example}
```

The run folder that it came from keeps the resolved settings (`config.yaml`) and `metrics.jsonl`.
"""


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}): copy it again") from error


def _fill(model: Stage1Model | Stage2Model, path: Path) -> None:
    state = _read(path)
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(LANGUAGE_PREFIX)}
    if absent := ours.keys() ^ state.keys():
        raise CheckpointError(f"{path}: does not fit its config.json ({len(absent)} tensors such as {min(absent)})")
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(ours[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])
