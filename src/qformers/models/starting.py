"""What a training run goes on from: the image encoder, Q-Former and language model of a run or of a saved model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import LanguageConfig, QFormerReads
from qformers.models.presets import VISION_NORM_EPS, QFormerShape
from qformers.models.saving import FORMATS, LANGUAGE_PREFIX, model_folder, read_description, reads_instructions
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model
from qformers.models.tensors import open_tensors

logger = logging.getLogger(__name__)


def start_from(model: Stage1Model | Stage2Model, folder: str | Path) -> None:
    """Fill `model` from the run or saved model `folder`: the image encoder, `vision_norm` and the Q-Former.

    A stage-1 model takes the heads and the temperature of a stage-1 model too. A stage-2 model leaves those out, and
    takes the projection of a stage-2 model, if it has this width.

    Raises:
        CheckpointError: no such model, one of stage 2 where stage 1 is to go on, or one with another image encoder or
            Q-Former or readout of texts; names what does not fit.
    """
    folder = model_folder(folder)
    description = read_description(folder)
    if isinstance(model, Stage1Model) and description["format"] != FORMATS[1]:
        raise CheckpointError(f"{folder}: is of stage 2 and has no heads for retrieval: start from a stage-1 run")
    readout = description["model"].get("text_readout", "cls")
    if isinstance(model, Stage1Model) and readout != model.text_readout:
        raise CheckpointError(
            f"{folder}: its ITC reads texts by {readout}, the recipe's by {model.text_readout}: set model.text_readout"
        )
    state = open_tensors(folder)
    stored = state.described
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(LANGUAGE_PREFIX)}
    for name, tensor in ours.items():
        needed = not name.startswith("language_projection.")
        if name not in stored and needed:
            raise CheckpointError(f"{folder}: lacks {name}, so its image encoder or bridge is not the recipe's")
        if name in stored and stored[name].shape != tensor.shape and needed:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(stored[name].shape)}, the recipe's model {tuple(tensor.shape)}: "
                "set `model` as that run's config.yaml has it"
            )
    kept = ("vision_encoder.", "vision_norm.", "qformer.", "bridge.")
    leftover = [name for name in stored if name.startswith(kept) and name not in ours]
    if leftover:
        raise CheckpointError(
            f"{folder}: {len(leftover)} of its weights have no place in the recipe's model, first {min(leftover)}: "
            "set `model` as that run's config.yaml has it"
        )
    if any(name in stored and stored[name].shape != tensor.shape for name, tensor in ours.items()):
        logger.warning("%s: its projection is of another language model's width and starts afresh", folder)
    with torch.no_grad():
        for name, tensor in ours.items():
            if name in stored and stored[name].shape == tensor.shape:
                tensor.copy_(state.read(name))
    model.vision_norm.eps = description.get("vision_norm_eps", VISION_NORM_EPS)


def started_shape(folder: str | Path, shape: QFormerShape, qformer_reads: QFormerReads) -> QFormerShape:
    """`shape` without a text branch, where the model that training goes on from has none.

    Args:
        qformer_reads: what training is to show the Q-Former, as in `LanguageConfig`.

    Raises:
        CheckpointError: no model there.
        ConfigError: a Q-Former that reads text would go on without, or one without a text branch is to read.
    """
    description = read_description(model_folder(folder))
    has_text = description.get("qformer", {}).get("has_text", True)
    if qformer_reads == "nothing" and reads_instructions(description):
        raise ConfigError(
            f"{folder}: its Q-Former reads instructions (a VQA model, or InstructBLIP): set language.qformer_reads to "
            "what it reads, or training would not show it any"
        )
    if qformer_reads != "nothing" and not has_text:
        raise ConfigError(
            f"{folder}: its Q-Former has no text branch, which qformer_reads {qformer_reads} needs: start from "
            "a run of stage 1, or from one of stage 2 that began with it"
        )
    return replace(shape, has_text=has_text)


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
