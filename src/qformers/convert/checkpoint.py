"""What every format is read into and written from: a description, tensors under our names, and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qformers.errors import CheckpointError, ConfigError
from qformers.models.language import LanguageModel
from qformers.models.saving import LANGUAGE_PREFIX, build_described, check_fit
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model
from qformers.models.tensors import Tensors
from qformers.models.vision import one_line, quiet_loading

# Made anew from the config by the models that once stored them.
_WITHOUT_MEANING = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    "EncDecAttention.relative_attention_bias.weight",
)
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class LanguageSource:
    """A checkpoint's language model: its own config, its tensors under its own names, and where `load` finds it.

    `part_of_blip2` is its config as the whole model's folder has it, where it is a part of one.
    """

    config: dict[str, Any]
    tensors: Tensors
    path: Path
    part_of_blip2: PretrainedConfig | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, whatever its format. Nothing of it is in memory but names, shapes and settings.

    `description` is what config.json of our own format says. Tokenizers are folders; None where there is none.
    """

    source: str
    description: dict[str, Any]
    tensors: Tensors
    language: LanguageSource | None
    tokenizer: Path | None
    language_tokenizer: Path | None


def require_cls_readout(checkpoint: Checkpoint) -> None:
    """Raises ConfigError for a stage-1 model whose ITC reads the mean of a text's tokens: other formats know [CLS]."""
    if checkpoint.description["model"].get("text_readout", "cls") != "cls" and checkpoint.language is None:
        raise ConfigError(
            f"{checkpoint.source}: its ITC reads the mean of a text's tokens (model.text_readout) and other formats "
            "[CLS]: keep it in our format, or train it with text_readout cls"
        )


def skeleton(description: dict[str, Any], language: dict[str, Any] | None, source: str) -> Stage1Model | Stage2Model:
    """The described model on the meta device: names and shapes of all its weights, and no numbers.

    Raises:
        CheckpointError: sizes that no model can have.
    """
    try:
        with torch.device("meta"):
            return build_described(description, _speaker(description, language))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: no model can be built from its config ({one_line(error)})") from error


def own_weights(model: Stage1Model | Stage2Model) -> dict[str, Tensor]:
    """The weights of a skeleton that are not the language model's."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(LANGUAGE_PREFIX)}


def check(checkpoint: Checkpoint) -> Stage1Model | Stage2Model:
    """The skeleton of `checkpoint`, whose tensors fit it one for one, those of the language model too.

    Raises:
        CheckpointError: some are missing, left over or of another shape than the config says.
    """
    language = checkpoint.language
    model = skeleton(checkpoint.description, language and language.config, checkpoint.source)
    check_fit(checkpoint.tensors, own_weights(model), f"{checkpoint.source}: its weights")
    if language is not None and isinstance(model, Stage2Model):
        check_language(language.tensors, model.language_model.model, checkpoint.source)
    return model


def check_language(tensors: Tensors, model: PreTrainedModel, source: str) -> None:
    """Raise CheckpointError unless the language model's `tensors` are those of the skeleton `model`.

    Of weights that are one (input and output embeddings) any may be stored.
    """
    groups: dict[int, list[str]] = {}
    weights = model.state_dict(keep_vars=True)
    for name, weight in weights.items():
        groups.setdefault(id(weight), []).append(name)
    kind = model.config.model_type
    for names in groups.values():
        if not any(name in tensors.described for name in names):
            raise CheckpointError(f"{source}: its language model lacks {names[0]}: not a whole {kind}")
    for name, found in tensors.described.items():
        if name not in weights:
            raise CheckpointError(f"{source}: {name} has no place in its language model, {kind}")
        if found.shape != weights[name].shape:
            raise CheckpointError(
                f"{source}: {name} of its language model has shape {tuple(found.shape)}, "
                f"its config says {tuple(weights[name].shape)}"
            )


def language_tensors(tensors: Tensors, model: PreTrainedModel) -> Tensors:
    """Stored `tensors` of a language model under the names of `model`.

    Those that mean nothing are left out. Those saved from the base model alone, as GPT-2's are, get its name in front.
    """
    kept = tensors.chosen(name for name in tensors.described if not name.endswith(_WITHOUT_MEANING))
    weights, prefix = model.state_dict(), f"{model.base_model_prefix}."
    bare = bool(kept.described) and all(prefix + name in weights for name in kept.described)
    return kept.with_prefix(prefix) if bare else kept


def language_skeleton(config: dict[str, Any]) -> PreTrainedModel:
    """The language model of a config, to be built on the meta device."""
    filled: PretrainedConfig = AutoConfig.for_model(**config)
    auto = AutoModelForSeq2SeqLM if filled.is_encoder_decoder else AutoModelForCausalLM
    with quiet_loading():
        return auto.from_config(filled)


def local_folder(source: str | Path, weights: bool = True) -> Path:
    """The folder `source`, or that of a hub id, fetched.

    Args:
        weights: False: config and tokenizer alone.

    Raises:
        ConfigError: no such folder, and no hub id that can be reached.
    """
    if Path(source).exists():
        return Path(source)
    try:
        if str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1:
            raise HFValidationError("there is no such folder")
        found = Path(snapshot_download(str(source), allow_patterns=[*_SMALL_FILES, *(["*.safetensors"] * weights)]))
        if weights and not list(found.glob("*.safetensors")):
            snapshot_download(str(source), allow_patterns=["*.bin"])
        return found
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{source}: neither a folder nor a hub id that can be reached ({one_line(error)})") from error


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises CheckpointError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({one_line(error)})") from error


def folder_with(folder: Path, *files: str) -> Path | None:
    """`folder` if it holds one of `files`."""
    return folder if any((folder / file).is_file() for file in files) else None


TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


def _speaker(description: dict[str, Any], language: dict[str, Any] | None) -> LanguageModel | None:
    if language is None:
        return None
    settings = description["language"]
    return LanguageModel(language_skeleton(language), settings["end_id"], settings["pad_id"])
