"""AdamW with decay where decay belongs, and the learning rate of each step."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from qformers.models.bert import started_from_bert
from qformers.training.config import OptimiserConfig

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
VISION_PREFIX = "vision_encoder."
TEXT_ALONE = re.compile(r"^qformer\.(text_embeddings|blocks\.\d+\.text_ffn)")
SHARED = re.compile(r"^qformer\.(embedding_norm|blocks\.\d+\.self_attention)")
VISION_LAYER = re.compile(r"\.(?:layers?|stages|blocks)\.(\d+)\.")


def learning_rate(step: int, config: OptimiserConfig, total_steps: int) -> float:
    """The rate of step 1 … `total_steps`: linear from 0 to `lr`, then half a cosine down to `min_lr`.

    With `min_lr` 0 this is transformers' `get_cosine_schedule_with_warmup`. Counting from 1 gives the first
    step a rate above 0 and the last step exactly `min_lr`.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trainable parameters by name: those that decay, and those that must not.

    Decay pulls towards zero, which only makes sense for weight matrices. Spared are biases, LayerNorms and
    every other parameter of fewer than two axes (the temperature among them), and learned vectors that are
    *inputs*: query tokens and embeddings, all of which the authors' code decays.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, spared = {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        is_input = id(parameter) in embeddings or "token" in leaf or "embed" in leaf
        group = spared if parameter.ndim < 2 or is_input else decayed
        group[name] = parameter
    return decayed, spared


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, fused where the device has the kernel.

    Each group carries its `lr_scale`: weights that came from the BERT learn at `pretrained_lr_scale` of the rate, those
    of them that only texts pass through at `text_lr_scale` of that, those that texts and queries share at
    `shared_lr_scale` of that, a trained image encoder's last layer at the whole rate and each layer below at
    `vision_layer_decay` of it.
    """
    layers = vision_layers(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for members, weight_decay in zip(decay_groups(model), (config.weight_decay, 0.0), strict=True):
        for name, parameter in members.items():
            lr_scale = config.pretrained_lr_scale if started_from_bert(name) else 1.0
            if TEXT_ALONE.match(name):
                lr_scale *= config.text_lr_scale
            if SHARED.match(name):
                lr_scale *= config.shared_lr_scale
            if name.startswith(VISION_PREFIX):
                lr_scale = config.vision_layer_decay ** (layers - vision_layer(name))
            groups.setdefault((weight_decay, lr_scale), []).append(parameter)
    devices = {parameter.device.type for members in groups.values() for parameter in members}
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": weight_decay, "lr_scale": lr_scale}
            for (weight_decay, lr_scale), members in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=devices <= FUSED_DEVICES,
    )


def vision_layer(name: str) -> int:
    """Which layer of the image encoder a parameter belongs to: 1 the first, 0 the embeddings before it."""
    found = VISION_LAYER.search(name)
    return int(found.group(1)) + 1 if found else 0


def vision_layers(model: nn.Module) -> int:
    """How many layers the image encoder of `model` has."""
    return max(
        (vision_layer(name) for name, _ in model.named_parameters() if name.startswith(VISION_PREFIX)), default=0
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> float:
    """Use `rate`, times the group's scale, for every parameter from the next step on; gives `rate` back."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate
