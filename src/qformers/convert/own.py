"""Our own format: read without loading it, and written from any other, shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

from qformers.convert.checkpoint import Checkpoint, LanguageSource, check, open_tokenizer, skeleton
from qformers.errors import CheckpointError
from qformers.models.card import model_card
from qformers.models.config import ModelConfig
from qformers.models.saving import (
    CONFIG_FILE,
    LANGUAGE_FOLDER,
    LANGUAGE_TOKENIZER_FOLDER,
    TOKENIZER_FOLDER,
    describe_model,
    language_config,
    model_folder,
    own_card,
    read_description,
    tokenizer_folders,
    write_description,
)
from qformers.models.tensors import open_tensors, write_shards


def read_own(folder: Path) -> Checkpoint:
    """A run or a saved model of ours.

    Raises:
        CheckpointError: damaged, or something is missing.
    """
    folder = model_folder(folder)
    description, language = read_description(folder), None
    if "language" in description:
        inside = folder / LANGUAGE_FOLDER
        path = inside / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: the language model's config cannot be read ({error})") from error
        language = LanguageSource(config, open_tensors(inside), inside)
    tokenizer, language_tokenizer = tokenizer_folders(folder)
    # What the first versions did not write down is read off the model.
    model = skeleton(description, language and language.config, str(folder))
    full = describe_model(model, ModelConfig(**description["model"]), language_config(description))
    return Checkpoint(
        source=str(folder),
        description=full | description,
        tensors=open_tensors(folder),
        language=language,
        tokenizer=tokenizer,
        language_tokenizer=language_tokenizer,
    )


def write_own(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the files of `saving.save_model`, weights in the dtype in which they were stored."""
    model, description = check(checkpoint), checkpoint.description
    write_shards(checkpoint.tensors, folder, "writing the image encoder and the Q-Former")
    if checkpoint.language is not None:
        inside = folder / LANGUAGE_FOLDER
        inside.mkdir()
        (inside / CONFIG_FILE).write_text(json.dumps(checkpoint.language.config, indent=2) + "\n", encoding="utf-8")
        write_shards(checkpoint.language.tensors, inside, "writing the language model")
    for tokenizer, name in (
        (checkpoint.tokenizer, TOKENIZER_FOLDER),
        (checkpoint.language_tokenizer, LANGUAGE_TOKENIZER_FOLDER),
    ):
        if tokenizer is not None:
            open_tokenizer(tokenizer).save_pretrained(folder / name)
    card = own_card(Path(checkpoint.source))
    fresh = model_card(model, ModelConfig(**description["model"]), language_config(description))
    write_description(folder, description, card or fresh)
