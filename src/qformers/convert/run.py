"""Any BLIP-2 checkpoint: opened as a model, or written in another format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from qformers.convert.checkpoint import Checkpoint, local_folder
from qformers.convert.export import write_huggingface
from qformers.convert.huggingface import read_config, read_huggingface
from qformers.convert.lavis import read_lavis, write_lavis
from qformers.convert.own import read_own, write_own
from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import Dtype, FrozenParts, LanguageConfig
from qformers.models.language import build_language_model
from qformers.models.saving import FORMATS, LoadedModel, load_described, load_model, model_folder

Format = Literal["qformers", "hf", "lavis"]
PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def open_model(source: str | Path, parts: FrozenParts | None = None, dtype: Dtype = "auto") -> LoadedModel:
    """A model in eval mode on the CPU: a run or saved model of ours, a Hugging Face folder or hub id, a .pth of LAVIS.

    Args:
        parts: the frozen models that a .pth leaves out.
        dtype: of the language model's weights, as in `LanguageConfig`.

    Raises:
        ConfigError: nothing there, or a .pth whose frozen models are not named. CheckpointError: damaged or no BLIP-2.
    """
    place = _place(source)
    if place.is_dir() and _is_ours(place):
        return load_model(place, dtype)
    checkpoint = _read(place, str(source), parts or FrozenParts())
    speaker = None
    if (language := checkpoint.language) is not None:
        settings = checkpoint.description["language"]
        stored = LanguageConfig(path=str(language.path), dtype=dtype)
        speaker = build_language_model(stored, settings["end_id"], settings["pad_id"], language.part_of_blip2)
    return load_described(
        checkpoint.description,
        checkpoint.tensors,
        speaker,
        Path(checkpoint.source),
        checkpoint.tokenizer,
        checkpoint.language_tokenizer,
    )


def convert(source: str | Path, destination: str | Path, to: Format, parts: FrozenParts | None = None) -> None:
    """Write the checkpoint `source` to the new folder `destination` (`to` lavis: file), shard by shard.

    Every weight keeps its dtype and its bits.

    Raises:
        ConfigError: `destination` is there already, or as `open_model`, or `to` has no place for this image encoder.
        CheckpointError: as `open_model`, or it could not be written.
    """
    final = Path(destination)
    if final.exists():
        raise ConfigError(f"{final} is there already: give another destination, or remove it")
    checkpoint = _read(_place(source), str(source), parts or FrozenParts())
    bridge = checkpoint.description["model"].get("bridge", "qformer")
    if bridge != "qformer" and to != "qformers":
        raise ConfigError(f"{source}: its bridge is {bridge}: only a Q-Former has a place in other formats")
    unfinished = final.with_name(f".unfinished_{final.name}")
    try:
        _remove(unfinished)
        if to == "lavis":
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            write_lavis(checkpoint, unfinished)
        else:
            unfinished.mkdir(parents=True)
            (write_own if to == "qformers" else write_huggingface)(checkpoint, unfinished)
        unfinished.rename(final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: could not be written ({error}): free some space") from error
    finally:
        _remove(unfinished)


def _place(source: str | Path) -> Path:
    if Path(source).suffix in PICKLES and not Path(source).is_file():
        raise ConfigError(f"{source}: there is no such file")
    return local_folder(source)


def _is_ours(folder: Path) -> bool:
    return read_config(model_folder(folder)).get("format") in FORMATS.values()


def _read(place: Path, name: str, parts: FrozenParts) -> Checkpoint:
    if place.is_file():
        if place.suffix not in PICKLES:
            raise ConfigError(f"{name}: is a file: give a folder, a hub id, or a .pth of LAVIS")
        return read_lavis(place, parts)
    return read_own(place) if _is_ours(place) else read_huggingface(place, name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
