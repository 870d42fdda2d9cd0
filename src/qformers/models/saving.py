"""A finished model as a folder: config.json, model.safetensors (frozen encoder included), tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qformers.errors import CheckpointError
from qformers.models.config import ModelConfig
from qformers.models.presets import build_stage1
from qformers.models.stage1 import Stage1Model
from qformers.models.vision import VisionEncoder
from qformers.version import __version__

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"
CARD_FILE = "README.md"
FORMAT = "qformers-stage1"


@runtime_checkable
class SavesItself(Protocol):
    """Anything that writes its files into a folder: the tokenizer, which lives in another layer."""

    def save(self, folder: Path) -> None: ...


def save_model(model: Stage1Model, config: ModelConfig, tokenizer: SavesItself, folder: Path) -> None:
    """Write a folder that `load_model` reads back bit for bit, encoder included. An older one is replaced.

    Raises:
        CheckpointError: it could not be written; an older folder is then left as it was.
    """
    unfinished = folder.with_name(f".unfinished_{folder.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        description = {
            "format": FORMAT,
            "qformers_version": __version__,
            "model": asdict(config),
            "vocab_size": model.dec_id + 1,
            "vision": model.vision_encoder.describe(),
        }
        (unfinished / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(unfinished / TOKENIZER_FOLDER)
        (unfinished / CARD_FILE).write_text(model_card(model, config), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{folder}: the model could not be saved ({error}): free some space") from error


def load_model(folder: str | Path) -> tuple[Stage1Model, ModelConfig]:
    """The model that `save_model` wrote, in eval mode on the CPU, and the config it was built from.

    Raises:
        CheckpointError: no such folder, damaged files, or weights of another shape than config.json says.
    """
    folder = model_folder(folder)
    description = read_description(folder)
    try:
        config = ModelConfig(**description["model"])
        encoder = VisionEncoder.from_description(description["vision"])
        # The weights come from the file: nothing is fetched from where training started.
        unstarted = ModelConfig(**{**asdict(config), "start_from_text_encoder": False})
        model = build_stage1(unstarted, description["vocab_size"], encoder)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: written by another version ({error})") from error
    _fill(model, folder / WEIGHTS_FILE)
    return model.eval(), config


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
    if description.get("format") != FORMAT:
        found = description.get("format") or description.get("model_type") or "something else"
        raise CheckpointError(f"{folder}: holds {found}, not a model saved by qformers ({FORMAT})")
    return description


def model_card(model: Stage1Model, config: ModelConfig) -> str:
    """What a stranger needs to know of the folder, from the model itself."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.vision_encoder.parameters())
    encoder = model.vision_encoder
    return f"""# A Q-Former, stage 1

Image-text model of the BLIP-2 kind (arXiv 2301.12597): ITC similarity, ITM match score, ITG captions.
No language model.

- Image encoder: `{Path(config.vision_encoder).name}`, layer {encoder.layer}, {encoder.image_px} px,
  frozen, {frozen:,} parameters.
- Q-Former: preset `{config.preset}`, {config.num_queries} queries, {trained:,} trained parameters with the heads.
- Text: started from `{Path(config.text_encoder).name}`.

```python
import qformers

model = qformers.load("this/folder")
model.itc(["picture.jpg"], ["a poodle", "a canoe"])
```

The run folder that it came from keeps the resolved settings (`config.yaml`) and `metrics.jsonl`.
"""


def _fill(model: Stage1Model, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder again")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}): copy it again") from error
    ours = model.state_dict()
    if absent := ours.keys() ^ state.keys():
        raise CheckpointError(f"{path}: does not fit its config.json ({len(absent)} tensors such as {min(absent)})")
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(ours[name].shape)}"
            )
    with torch.no_grad():
        model.load_state_dict(state)
