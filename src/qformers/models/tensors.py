"""Named tensors of a checkpoint: read from its files one at a time, written shard by shard.

A checkpoint may be larger than the machine's memory, so nothing here holds more than one shard. Nothing here unpickles
either: files of `torch.save` are read with `weights_only=True`, which knows tensors and plain containers and nothing
that could run.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qformers.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
# Where a Hugging Face folder keeps its weights: the first that is there.
WEIGHT_FILES = (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD_BYTES = 2**30

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Tensors:
    """Tensors by name. `described` has their shapes and dtypes (on the meta device); `read` gives one of them."""

    described: dict[str, Tensor]
    read: Callable[[str], Tensor]

    def chosen(self, names: Iterable[str]) -> Tensors:
        """Some of them."""
        return Tensors({name: self.described[name] for name in names}, self.read)

    def without_prefix(self, prefix: str) -> Tensors:
        """Those whose name begins with `prefix`, named without it."""
        described = {
            name.removeprefix(prefix): meta for name, meta in self.described.items() if name.startswith(prefix)
        }
        return Tensors(described, lambda name: self.read(prefix + name))

    def with_prefix(self, prefix: str) -> Tensors:
        """All of them, each name behind `prefix`."""
        described = {prefix + name: meta for name, meta in self.described.items()}
        return Tensors(described, lambda name: self.read(name.removeprefix(prefix)))

    def joined(self, other: Tensors) -> Tensors:
        """These and those of `other`, which has other names."""
        described = {**self.described, **other.described}
        return Tensors(described, lambda name: (self if name in self.described else other).read(name))


def in_memory(tensors: dict[str, Tensor]) -> Tensors:
    """Tensors that are there already."""
    return Tensors({name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.__getitem__)


def open_tensors(folder: Path) -> Tensors:
    """The weights of a Hugging Face folder: one file, or an index and its shards.

    Raises:
        CheckpointError: none there, a shard is missing or damaged, or a file needs more than `weights_only`.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            path = folder / name
            return _Shards(_indexed(path) if name.endswith(".json") else {None: path}).tensors()
    raise CheckpointError(f"{folder / WEIGHTS_FILE} is missing: copy the whole folder again")


def open_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one safetensors file and its metadata. Raises CheckpointError if it is damaged."""
    return _Shards({None: path}).tensors(), _open_safetensors(path).metadata() or {}


def open_pickle(path: Path) -> Any:
    """What `torch.save` wrote, its tensors mapped into memory and read when they are used.

    Raises:
        CheckpointError: damaged, of PyTorch before 1.6, or holding anything but tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = str(error).partition("GLOBAL ")[2].split(" ")[0] or "an object"
        raise CheckpointError(
            f"{path}: holds {culprit}, not tensors alone; reading it could run code, so it is refused: "
            "save its state dict as safetensors where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged, or no zip as torch.save writes since PyTorch 1.6: fetch it again, or save it again"
        ) from error


def fingerprint(state: Mapping[str, Tensor], by_value: bool = False) -> str:
    """sha256 over names, shapes, dtypes and bytes of weights; `by_value`, of halves read as float32 it is the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if by_value and tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_shards(
    tensors: Tensors, folder: Path, what: str, always_index: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` into `folder` as model.safetensors, or as shards of at most `shard_bytes` and their index.

    Args:
        what: named beside the progress bar. always_index: write the index for a single file too, for readers that take
            every safetensors file of a folder which no index leaves out.
    """
    split = split_torch_state_dict_into_shards(tensors.described, max_shard_size=shard_bytes)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=len(tensors.described))
        for filename, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                # A clone, since a tensor cut out of another would share its memory, which the format does not have.
                tensor = tensors.read(name)
                shard[name] = tensor if _owns_memory(tensor) else tensor.clone(memory_format=torch.contiguous_format)
                progress.advance(task)
            save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded or always_index:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _owns_memory(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


class _Shards:
    """Files that hold tensors; one is open at a time, so that only what is being read is in memory."""

    def __init__(self, files: dict[str | None, Path]) -> None:
        self.indexed = files
        self.files: dict[str, Path] = {}
        self._open_path: Path | None = None
        self._read: Callable[[str], Tensor] = {}.__getitem__

    def tensors(self) -> Tensors:
        """Every tensor of the files. Raises CheckpointError if the index names one that is not there."""
        described: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.indexed.values()):
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, one of {len(set(self.indexed.values()))} shards: fetch it")
            found = _describe(path)
            described |= found
            self.files |= dict.fromkeys(found, path)
        for name, path in self.indexed.items():
            if name is not None and self.files.get(name) != path:
                raise CheckpointError(f"{path}: lacks {name}, which the index says it holds: fetch both again")
        return Tensors(described, self.read)

    def read(self, name: str) -> Tensor:
        path = self.files[name]
        if path != self._open_path:
            self._read = _reader(path)
            self._open_path = path
        return self._read(name)


def _indexed(path: Path) -> dict[str | None, Path]:
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: path.parent / file for name, file in names.items()}
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no index of shards ({error}): fetch it again") from error


def _open_safetensors(path: Path) -> Any:
    try:
        # By pread: pages of a mapped file would count as this process's memory until the file is closed.
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}): copy it again") from error


def _describe(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in state_dict_of(open_pickle(path), path).items()}
    opened = _open_safetensors(path)
    described = {}
    for name in opened.keys():  # noqa: SIM118, it is no mapping
        view = opened.get_slice(name)
        if view.get_dtype() not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is stored as {view.get_dtype()}: use a checkpoint in 16 or 32 bits")
        described[name] = torch.empty(view.get_shape(), dtype=_DTYPES[view.get_dtype()], device="meta")
    return described


def _reader(path: Path) -> Callable[[str], Tensor]:
    if path.suffix != ".safetensors":
        return state_dict_of(open_pickle(path), path).__getitem__
    return _open_safetensors(path).get_tensor


def state_dict_of(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name that `path` holds. Raises CheckpointError if it holds something else."""
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: holds no tensors by name: it is no checkpoint of weights")
    return loaded
