"""Which Hugging Face vision towers can be read, and how each is cut down to the layers that are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)


class TransformerBody(nn.Module):
    """A ViT up to the layer that is read. `pre_norm` is CLIP's LayerNorm before the first layer."""

    def __init__(
        self,
        embeddings: nn.Module,
        pre_norm: nn.Module | None,
        encoder: nn.Module,
        embed_options: dict[str, bool],
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.pre_norm = pre_norm
        self.encoder = encoder
        self.embed_options = embed_options

    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches dim"]:
        hidden = self.embeddings(pixel_values, **self.embed_options)
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        return self.encoder(hidden).last_hidden_state


class ConvolutionalBody(nn.Module):
    """A CNN up to the stage that is read; each cell of its feature map is one patch, row by row."""

    def __init__(self, embeddings: nn.Module, stages: nn.ModuleList) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stages = stages

    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches dim"]:
        hidden = self.embeddings(pixel_values)
        for stage in self.stages:
            hidden = stage(hidden)
        return rearrange(hidden, "batch dim height width -> batch (height width) dim")


@dataclass(frozen=True)
class Geometry:
    """What a body gives for one picture: `prefix_tokens` ([CLS]), then (image_px / patch_px)² patches."""

    dim: int
    patch_px: int
    prefix_tokens: int


@dataclass(frozen=True)
class Family:
    """How one family of Hugging Face models is cut down to what is read of it.

    `shorten(config, layer)` gives the settings under which only `layer` layers are built; from the model so
    built, `take(model, config, layer)` takes the parts that run. Of the model's layers the checkpoints may lack the
    last `layers_left_out`: they count in a layer given as −1, −2, …, and cannot be read.
    """

    name: str
    model: str
    mean: Sequence[float]
    std: Sequence[float]
    layers: Callable[[Any], int]
    shorten: Callable[[Any, int], dict[str, Any]]
    take: Callable[[Any, Any, int], tuple[TransformerBody | ConvolutionalBody, Geometry]]
    key_mapping: dict[str, str] | None = None
    layers_left_out: int = 0


def _depth(config: Any) -> int:
    return config.num_hidden_layers


def _stages(config: Any) -> int:
    return len(config.depths)


def _shorten_stages(config: Any, layer: int) -> dict[str, Any]:
    return {"depths": config.depths[:layer], "hidden_sizes": config.hidden_sizes[:layer]}


_EFFICIENTNET_STAGES = (
    "in_channels",
    "out_channels",
    "kernel_sizes",
    "strides",
    "expand_ratios",
    "num_block_repeats",
)


def _shorten_efficientnet(config: Any, layer: int) -> dict[str, Any]:
    return {name: getattr(config, name)[:layer] for name in _EFFICIENTNET_STAGES}


def _take_vit(model: Any, config: Any, layer: int) -> tuple[TransformerBody, Geometry]:
    # At the native size this "interpolation" gives back the position embeddings as they are.
    options = {"interpolate_pos_encoding": True}
    body = TransformerBody(model.embeddings, getattr(model, "pre_layrnorm", None), model.encoder, options)
    prefix_tokens = 1 if hasattr(model.embeddings, "class_embedding") else 0
    return body, Geometry(config.hidden_size, config.patch_size, prefix_tokens)


def _take_dinov2(model: Any, config: Any, layer: int) -> tuple[TransformerBody, Geometry]:
    body = TransformerBody(model.embeddings, None, model.encoder, {})
    return body, Geometry(config.hidden_size, config.patch_size, prefix_tokens=1)


def _take_resnet(model: Any, config: Any, layer: int) -> tuple[ConvolutionalBody, Geometry]:
    stride = 4 * 2 ** (layer - 1) * (2 if config.downsample_in_first_stage else 1)
    body = ConvolutionalBody(model.embedder, model.encoder.stages)
    return body, Geometry(config.hidden_sizes[-1], stride, prefix_tokens=0)


def _take_convnext(model: Any, config: Any, layer: int) -> tuple[ConvolutionalBody, Geometry]:
    stride = config.patch_size * 2 ** (layer - 1)
    body = ConvolutionalBody(model.embeddings, model.encoder.stages)
    return body, Geometry(config.hidden_sizes[-1], stride, prefix_tokens=0)


def _take_efficientnet(model: Any, config: Any, layer: int) -> tuple[ConvolutionalBody, Geometry]:
    """The head's 1 × 1 convolution (1280 wide in B0) counts as the layer after the last stage of blocks."""
    encoder = model.encoder
    stages = list(encoder.blocks)
    dim = stages[-1].projection.project_bn.num_features
    if layer > len(config.strides):
        stages.append(nn.Sequential(encoder.top_conv, encoder.top_bn, encoder.top_activation))
        dim = config.hidden_dim
    geometry = Geometry(dim, patch_px=2 * math.prod(config.strides), prefix_tokens=0)
    return ConvolutionalBody(model.embeddings, nn.ModuleList(stages)), geometry


_CLIP = Family(
    name="clip",
    model="CLIPVisionModel",
    mean=OPENAI_CLIP_MEAN,
    std=OPENAI_CLIP_STD,
    layers=_depth,
    shorten=lambda config, layer: {"num_hidden_layers": layer},
    take=_take_vit,
)
_SIGLIP = Family(
    name="siglip",
    model="SiglipVisionModel",
    mean=IMAGENET_STANDARD_MEAN,
    std=IMAGENET_STANDARD_STD,
    layers=_depth,
    shorten=lambda config, layer: {"num_hidden_layers": layer, "vision_use_head": False},
    take=_take_vit,
)
_DINOV2 = Family(
    name="dinov2",
    model="Dinov2Model",
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    layers=_depth,
    shorten=lambda config, layer: {"num_hidden_layers": layer, "use_mask_token": False},
    take=_take_dinov2,
)
# A whole BLIP-2 keeps its image encoder under a name that the encoder's own class does not know. Its checkpoints have
# 39 of EVA's 40 layers, since BLIP-2 reads the second-to-last: −2 is the last that is there, and none is removed again.
_EVA = replace(
    _CLIP,
    name="eva",
    model="Blip2VisionModel",
    layers_left_out=1,
    key_mapping={r"^(model\.)?vision_model\.": ""},
)
_INSTRUCT_EVA = replace(_EVA, model="InstructBlipVisionModel")
_RESNET = Family(
    name="resnet",
    model="ResNetModel",
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    layers=_stages,
    shorten=_shorten_stages,
    take=_take_resnet,
)
_CONVNEXT = replace(
    _RESNET,
    name="convnext",
    model="ConvNextModel",
    shorten=lambda config, layer: {**_shorten_stages(config, layer), "num_stages": layer},
    take=_take_convnext,
)
_EFFICIENTNET = replace(
    _RESNET,
    name="efficientnet",
    model="EfficientNetModel",
    layers=lambda config: len(config.strides) + 1,
    shorten=_shorten_efficientnet,
    take=_take_efficientnet,
)

# By the `model_type` of a config.json: a whole CLIP, SigLIP or BLIP-2 gives its vision tower. SigLIP 2 with a
# fixed resolution calls itself "siglip".
FAMILIES: dict[str, Family] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "blip-2": _EVA,
    "blip_2_vision_model": _EVA,
    "instructblip": _INSTRUCT_EVA,
    "instructblip_vision_model": _INSTRUCT_EVA,
    "resnet": _RESNET,
    "convnext": _CONVNEXT,
    "efficientnet": _EFFICIENTNET,
}
