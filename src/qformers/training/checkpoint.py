"""Checkpoints of a run: what resuming needs, in safetensors and JSON, whole or not there at all.

    step_00000100/model.safetensors       trainable parameters, and buffers outside frozen modules
                  optimiser.safetensors   AdamW's moments as `<parameter>/<moment>`
                  state.json              the step, its validation loss, the sha256 of the two files

Frozen parameters are absent: they come from where the config says. There is no random state to keep, because
the order of the data and every random draw are functions of (seed, step); see `loop.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qformers.errors import CheckpointError

MODEL_FILE = "model.safetensors"
OPTIMISER_FILE = "optimiser.safetensors"
STATE_FILE = "state.json"
UNFINISHED = ".unfinished_"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after `step`, copied: training may go on while it is written."""

    step: int
    model: dict[str, Tensor]
    moments: dict[str, Tensor]
    validation_loss: float | None  # measured after this very step

    @classmethod
    def take(
        cls, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, validation_loss: float | None = None
    ) -> Snapshot:
        """Copies of what training changes, in the machine's memory."""
        state, moments = trainable_state(model), _moments(model, optimiser)
        return cls(step, _copies(state), _copies(moments), validation_loss)


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `folder/step_<step>`; then remove the others but the `keep - 1` before it and the best.

    The files are complete and on the disk before their folder takes its name, so that a run killed meanwhile
    leaves no half-written `step_…`. The best is the one of the lowest validation loss.

    Raises:
        CheckpointError: it could not be written (a full disk); what was partly written is removed and earlier
            checkpoints are left as they were.
    """
    target = folder / f"step_{snapshot.step:08d}"
    unfinished = folder / f"{UNFINISHED}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _discard_unfinished(folder)
        unfinished.mkdir()
        _save_tensors(snapshot.model, unfinished / MODEL_FILE)
        _save_tensors(snapshot.moments, unfinished / OPTIMISER_FILE)
        sums = {name: _sha256(unfinished / name) for name in (MODEL_FILE, OPTIMISER_FILE)}
        state = {"step": snapshot.step, "validation_loss": snapshot.validation_loss, "sha256": sums}
        (unfinished / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        _sync(unfinished / STATE_FILE)
        _sync(unfinished)
        if target.exists():
            target.rename(_nameless(target))
        unfinished.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        survivor = max(list_checkpoints(folder), default=None)
        raise CheckpointError(
            f"cannot save {target}: {error}; "
            + (f"the last checkpoint is {survivor.name}" if survivor else "there is no earlier checkpoint")
            + "; free some space and continue with --resume auto"
        ) from error
    best = best_checkpoint(folder)
    earlier = [other for other in list_checkpoints(folder) if other <= target]
    later = [other for other in list_checkpoints(folder) if other > target]
    # A later one is there only because resuming found it damaged and passed it over.
    for stale in [other for other in earlier[:-keep] if other != best] + later:
        # It loses its name first, so that a half-removed checkpoint is never taken for one.
        stale.rename(_nameless(stale))
    _discard_unfinished(folder)
    return target


def load_checkpoint(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Fill `model` and `optimiser` from `checkpoint` and return its step.

    The file must hold exactly the trainable state of `model`, neither more nor less.

    Raises:
        CheckpointError: damaged, or of another model; names the first parameter that does not fit.
    """
    step = verify_checkpoint(checkpoint)
    state = trainable_state(model)
    shapes = _shapes(checkpoint / MODEL_FILE)
    for name in sorted(state.keys() | shapes.keys()):
        if name not in shapes:
            raise CheckpointError(f"{checkpoint}: lacks {name}, which this model trains: it is of another model")
        if name not in state:
            raise CheckpointError(
                f"{checkpoint}: holds {name}, which this model does not train: it is of another model"
            )
        if shapes[name] != tuple(state[name].shape):
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {shapes[name]}, this model's {tuple(state[name].shape)}: "
                "resume with the settings it was trained with, or start anew in another --output"
            )
    with safe_open(checkpoint / MODEL_FILE, framework="pt") as file, torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(file.get_tensor(name))
    parameters = dict(model.named_parameters())
    optimiser.state.clear()
    with safe_open(checkpoint / OPTIMISER_FILE, framework="pt") as file:
        for key in list(file.keys()):
            name, _, moment = key.rpartition("/")
            parameter = parameters[name]
            optimiser.state[parameter][moment] = file.get_tensor(key).to(parameter.device)
    return step


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; damaged ones are named in a warning and passed over."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(checkpoint)
        except CheckpointError as error:
            logger.warning("%s: passed over", error)
        else:
            return checkpoint
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the lowest validation loss, the earliest of equals; None where none was measured."""
    losses = {path: validation_loss(path) for path in list_checkpoints(folder)}
    best = min(losses, key=lambda path: losses[path], default=None)
    return None if best is None or math.isinf(losses[best]) else best


def validation_loss(checkpoint: Path) -> float:
    """What was measured after the checkpoint's step; infinite if nothing was, or it cannot be read."""
    try:
        loss = json.loads((checkpoint / STATE_FILE).read_text()).get("validation_loss")
        return math.inf if loss is None or math.isnan(loss) else float(loss)
    except (OSError, ValueError, TypeError, AttributeError):
        return math.inf


def verify_checkpoint(checkpoint: Path) -> int:
    """Check the files' sums and return the step. Raises CheckpointError if anything is missing or altered."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        step, sums = int(state["step"]), dict(state["sha256"])
        damaged = [name for name in (MODEL_FILE, OPTIMISER_FILE) if _sha256(checkpoint / name) != sums[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: damaged ({type(error).__name__}: {error})") from error
    if damaged:
        raise CheckpointError(f"{checkpoint}: damaged ({' and '.join(damaged)} not as written)")
    return step


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first, whole or not."""
    return sorted(folder.glob("step_*"))


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with gradients, and buffers outside frozen modules. Shared memory."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {
        f"{prefix}."
        for prefix, module in model.named_modules()
        if prefix and any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    }
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in kept and not any(name.startswith(prefix) for prefix in frozen)
    }
    return trained | buffers


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{moment}": value
        for name, parameter in model.named_parameters()
        if parameter in optimiser.state
        for moment, value in optimiser.state[parameter].items()
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(tensors), path)
    _sync(path)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until `path` (a file's bytes, a folder's entries) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nameless(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}_old")


def _discard_unfinished(folder: Path) -> None:
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
