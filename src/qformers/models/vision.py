"""One frozen image encoder behind one interface: any supported Hugging Face vision tower → patch embeddings.

Only what is read is kept: layers past the chosen one are not built, and no final LayerNorm, pooling head or
text tower. The paper reads the second-to-last layer (BLIP-2, section 3.4); `vision_norm`, which is trained,
follows.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from qformers.errors import CheckpointError, ConfigError
from qformers.models.tensors import fingerprint
from qformers.models.vision_families import FAMILIES, ConvolutionalBody, Family, Geometry, TransformerBody

DEFAULT_IMAGE_PX = 224
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


class VisionEncoder(nn.Module):
    """Pictures → patch embeddings of one layer, before any final LayerNorm, in the weights' dtype.

    Attributes:
        family: one of the names in `FAMILIES`; config: Hugging Face's, cut down to what is built.
        layer: the layer read, counted from 1 (so −2 of 12 layers is 11).
        dim, patches: shape of the output; `patches` counts [CLS] where there is one.
        prefix_tokens, grid: the output is `prefix_tokens` rows, then `grid` × `grid` patches, row by row.
        image_px: side of the square pictures it takes; mean, std: per channel, of its image processor.
    """

    def __init__(
        self,
        body: TransformerBody | ConvolutionalBody,
        geometry: Geometry,
        config: PretrainedConfig,
        layer: int,
        image_px: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.body = body
        self.config = config
        self.family = FAMILIES[config.model_type].name
        self.layer = layer
        self.image_px = image_px
        self.mean = (mean[0], mean[1], mean[2])
        self.std = (std[0], std[1], std[2])
        self.dim = geometry.dim
        self.patch_px = geometry.patch_px
        self.prefix_tokens = geometry.prefix_tokens
        self.grid = image_px // geometry.patch_px
        self.patches = geometry.prefix_tokens + self.grid**2

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches vision_dim"]:
        height, width = pixel_values.shape[2:]
        if (height, width) != (self.image_px, self.image_px):
            raise ConfigError(
                f"pictures are {height} × {width} px, the image encoder was built for {self.image_px} px: "
                "give both the same image_px"
            )
        return self.body(pixel_values.to(self.dtype)).to(self.dtype)

    def checkpoint_layers(self) -> None:
        """Compute each layer a second time in the backward pass instead of keeping what it computed.

        Raises:
            ConfigError: the family's layers cannot.
        """
        layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"layers of {self.family} cannot be checkpointed: set checkpoint_vision_encoder to false")
        layer: Any
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def describe(self) -> dict[str, Any]:
        """All but the weights, as plain JSON values; `from_description` is the inverse."""
        settings = self.config.to_dict()
        for backbone_only in ("out_features", "out_indices", "stage_names"):
            settings.pop(backbone_only, None)  # they name stages that the shortened config no longer has
        return {
            "config": settings,
            "layer": self.layer,
            "image_px": self.image_px,
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> VisionEncoder:
        """An encoder with random weights, to be filled from a saved model."""
        settings = description["config"]
        family = FAMILIES[settings["model_type"]]
        model_class = getattr(transformers, family.model)
        config = model_class.config_class.from_dict(settings)
        body, geometry = family.take(model_class(config), config, description["layer"])
        fields = {name: description[name] for name in ("layer", "image_px", "mean", "std")}
        return cls(body, geometry, config, **fields).to(getattr(torch, description["dtype"])).eval()

    def fingerprint(self) -> str:
        """`tensors.fingerprint` of the weights in use."""
        return fingerprint(self.state_dict())


def build_vision_encoder(
    path_or_hub_id: str | Path,
    *,
    layer: int = -2,
    image_px: int | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
) -> VisionEncoder:
    """The image encoder of a Hugging Face folder or hub id, cut off after `layer`.

    Args:
        layer: whose output is read, counted as `hidden_states`: −1 the last, −2 the second-to-last (the
            paper's), or from 1 for the first. Of a CNN the stages count, and EfficientNet's head is one more. A BLIP-2
            checkpoint already lacks its encoder's last layer: there −2 is the last one stored.
        image_px: side of the pictures; position embeddings are interpolated (bicubic) where it is not the
            native one. None: what the checkpoint's image processor gives, else the native size.
        dtype: of the weights and the output; "auto": as stored; None: float32, whatever the checkpoint is stored in.

    Raises:
        ConfigError: nothing there, no supported model, no such layer, or `image_px` no multiple of the patch.
        CheckpointError: weights damaged or missing.
    """
    source = str(path_or_hub_id)
    family = FAMILIES[_model_type(source)]
    model_class = getattr(transformers, family.model)
    with quiet_loading():
        try:
            whole = model_class.config_class.from_pretrained(source)
            layer = _resolve_layer(layer, family.layers(whole), family.layers_left_out, source)
            config = model_class.config_class.from_pretrained(source, **family.shorten(whole, layer))
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:
            raise ConfigError(f"{source}: config.json cannot be used ({one_line(error)})") from error
        body, geometry = _load(source, family, config, layer, dtype or torch.float32)
    processor = read_image_processor(source)
    image_px = _native_px(processor, config) if image_px is None else image_px
    if image_px < 1 or image_px % geometry.patch_px:
        raise ConfigError(
            f"image_px is {image_px}, no positive multiple of {source}'s patch of {geometry.patch_px} px: "
            "the border would be cut off; choose a multiple"
        )
    mean, std = processor.get("image_mean", family.mean), processor.get("image_std", family.std)
    return VisionEncoder(body, geometry, config, layer, image_px, mean, std).eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting weights it did not use, which is what cutting a model off means."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


def _model_type(source: str) -> str:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ConfigError(f"{source}: there is no such folder: name that of a Hugging Face image encoder, or a hub id")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"{source}: holds no config.json: name the folder of a Hugging Face image encoder")
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: neither a folder nor a hub id that can be reached ({one_line(error)})") from error
    model_type = config.get("model_type", "none")
    if model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ConfigError(f"{source}: model type {model_type} is no supported image encoder; supported: {supported}")
    return model_type


def _resolve_layer(layer: int, layers: int, left_out: int, source: str) -> int:
    resolved = layers + left_out + 1 + layer if layer < 0 else layer
    if not 1 <= resolved <= layers:
        without = f" (it leaves out the last {left_out} that the model had)" if left_out else ""
        raise ConfigError(
            f"layer is {layer}, but {source} has {layers} layers{without}: "
            f"use -{layers + left_out} to -{1 + left_out}, or 1 to {layers}"
        )
    return resolved


def _load(
    source: str, family: Family, config: PretrainedConfig, layer: int, dtype: torch.dtype | Literal["auto"]
) -> tuple[TransformerBody | ConvolutionalBody, Geometry]:
    options: dict[str, Any] = {"key_mapping": family.key_mapping} if family.key_mapping else {}
    try:
        model, loading = getattr(transformers, family.model).from_pretrained(
            source,
            config=config,
            dtype=dtype,
            # Norms and heads after the last kept stage have another width then; they are not used.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{source}: the weights cannot be read ({one_line(error)}): fetch them again") from error
    body, geometry = family.take(model, config, layer)
    used = {id(tensor) for tensor in body.state_dict(keep_vars=True).values()}
    needed = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in used}
    absent = needed & set(loading["missing_keys"])
    misshapen = needed & {name for name, *_ in loading["mismatched_keys"]}
    for names, fault in ((absent, "missing"), (misshapen, "of another shape than config.json says")):
        if names:
            raise CheckpointError(
                f"{source}: {len(names)} of {len(needed)} weights are {fault} (such as {min(names)}): "
                "not the checkpoint of this config.json"
            )
    return body, geometry


def read_image_processor(source: str) -> dict[str, Any]:
    """Settings of the image processor of a folder or hub id; none where there is none."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return {}
    return processor


def one_line(error: BaseException) -> str:
    """The message of an error from a library, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _native_px(processor: dict[str, Any], config: PretrainedConfig) -> int:
    crop = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    for size in (crop, processor.get("size"), getattr(config, "image_size", None)):
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        if size:
            return int(size)
    return DEFAULT_IMAGE_PX
