"""What makes a large model fit, or run faster, without changing its results: sharding, recomputing, compiling, fp16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qformers.distributed import world_size
from qformers.errors import ConfigError
from qformers.models.bridges import PerceiverResampler
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import BridgedModel, Stage2Model
from qformers.models.vision import one_line

LOSS_SCALE, GROWTH = "loss_scale", "loss_scale_growth"
COMPILED_VARIANTS = 32  # of one block: with or without an image, one or two memories, every position or some

Model = Stage1Model | Stage2Model


def shard_frozen_models(model: Model, device: torch.device) -> None:
    """Keep an equal share of each large frozen model on each process (FSDP2); a layer is gathered when it runs.

    Frozen weights have no gradients and no moments, so they are all that is worth sharding here: the trained
    Q-Former is small, stays whole on every process, and its gradients are averaged as without sharding.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    for part in _large_models(model):
        if any(weights.requires_grad for weights in part.parameters()):
            continue
        for layer in _layers(part):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # What is left: embeddings, norms, the vocabulary head.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def leave_out_frozen(objective: nn.Module) -> None:
    """Keep DistributedDataParallel from sending frozen models around: each process has read its own, or a share."""
    frozen = [name for name, weights in objective.named_parameters() if not weights.requires_grad]
    modules = {name.rpartition(".")[0] for name in frozen}
    buffers = [name for name, _ in objective.named_buffers() if name.rpartition(".")[0] in modules]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen + buffers)


def whole_state(model: Model) -> dict[str, Tensor] | None:
    """The weights of a model with sharded parts, whole, on the main process; None if nothing is sharded.

    Every process has to call it.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[int, str] = {}
    for name, weights in model.named_parameters(remove_duplicate=False):
        if whole:  # tied weights are one tensor again, as Hugging Face saves them
            whole[name] = whole[first.setdefault(id(weights), name)]
    return whole


def recompute_layers(model: Model) -> None:
    """Compute the Q-Former's blocks and the language model's layers a second time in the backward pass.

    Only what enters a layer is then kept, not what it computed. (Hugging Face's own switch does nothing in a frozen
    model, which is in eval mode.)
    """
    layers: list[nn.Module] = [*_blocks(model)]
    if isinstance(model, Stage2Model):
        layers += _layers(model.language_model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model: Model) -> None:
    """Have `torch.compile` make code of the Q-Former's blocks, for texts and batches of any size.

    Raises:
        ConfigError: this machine lacks what compiling needs.
    """
    try:
        torch.compile(_try_compiler)(torch.ones(8))
    except Exception as error:  # whatever is missing: a compiler, Python's headers, Triton
        reason = one_line(error.__cause__ or error)
        raise ConfigError(
            f"compile needs a working C++ compiler ({reason}): install g++, or set it to false"
        ) from error
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    for block in _blocks(model):
        block.compile(dynamic=True)


class LossScaler:
    """fp16's gradients are computed of a scaled loss, or they would round to 0; in any other precision nothing.

    A step whose gradients are too large for fp16 is skipped and the scale halved. The scale is kept in the optimiser's
    state, so that a checkpoint has it.
    """

    def __init__(self, enabled: bool, device: torch.device, optimiser: torch.optim.Optimizer) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self._optimiser = optimiser
        if enabled and (kept := self._kept) and LOSS_SCALE in kept:
            state = {"scale": kept[LOSS_SCALE].item(), "_growth_tracker": int(kept[GROWTH].item())}
            self._scaler.load_state_dict(self._scaler.state_dict() | state)

    @property
    def scale(self) -> float | None:
        """The factor of the loss; None without one."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled."""
        self._scaler.scale(loss).backward()

    def unscale(self) -> None:
        """Give the gradients their own size."""
        self._scaler.unscale_(self._optimiser)

    def step(self) -> None:
        """The optimiser's step, unless the gradients were too large."""
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self.scale is not None and self._kept:
            state = self._scaler.state_dict()
            self._kept[LOSS_SCALE] = torch.tensor(state["scale"])
            self._kept[GROWTH] = torch.tensor(float(state["_growth_tracker"]))

    @property
    def _kept(self) -> dict[str, Any]:
        """The state of the first parameter, filled by the optimiser's first step."""
        return self._optimiser.state.get(self._optimiser.param_groups[0]["params"][0], {})


def _large_models(model: Model) -> Iterator[nn.Module]:
    yield model.vision_encoder
    if isinstance(model, Stage2Model):
        yield model.language_model


def _blocks(model: Model) -> Iterator[nn.Module]:
    """The Q-Former's blocks, or the perceiver's layers; nothing where the bridge has neither."""
    if not isinstance(model, BridgedModel):
        yield from model.qformer.blocks
    elif isinstance(model.bridge, PerceiverResampler):
        yield from model.bridge.layers


def _layers(part: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model."""
    return [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]


def _try_compiler(numbers: Tensor) -> Tensor:
    return numbers.sin() + 1
