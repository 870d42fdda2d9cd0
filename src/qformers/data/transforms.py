"""Picture → normalised tensor: random resized crop and flip to train, resize and centre crop to evaluate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from qformers.data.config import TransformConfig
from qformers.errors import ConfigError

_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_STRIP_RATIO = 64

Box = tuple[int, int, int, int]
Channels = tuple[float, float, float]


@runtime_checkable
class EncoderInput(Protocol):
    """What an image encoder says of the pictures it takes."""

    image_px: int
    mean: Channels
    std: Channels


def transform_for(encoder: EncoderInput, config: TransformConfig | None = None) -> TransformConfig:
    """`config` with the size and the normalisation of `encoder`.

    Raises:
        ConfigError: `config` names another normalisation than the encoder was trained with.
    """
    config = config or TransformConfig()
    for name, chosen, own in (("mean", config.mean, encoder.mean), ("std", config.std, encoder.std)):
        if chosen is not None and any(abs(a - b) > 1e-3 for a, b in zip(chosen, own, strict=True)):
            raise ConfigError(
                f"transform.{name} is {list(chosen)}, but the image encoder was trained with {list(own)}: "
                f"leave transform.{name} out, or set it to that"
            )
    return replace(config, image_px=encoder.image_px, mean=encoder.mean, std=encoder.std)


def train_transform(
    image: Image.Image, config: TransformConfig, generator: np.random.Generator
) -> Float[Tensor, "3 height width"]:
    """Random resized crop (bicubic, antialiased) and, half the time, a horizontal flip (PAPER: section 5).

    Crops are drawn as torchvision's RandomResizedCrop does, with ratio 3/4–4/3.
    """
    image = image.crop(_random_crop(image.width, image.height, config.crop_scale, generator))
    image = image.resize((config.image_px, config.image_px), Image.Resampling.BICUBIC)
    if config.flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _normalise(image, config)


def evaluation_transform(image: Image.Image, config: TransformConfig) -> Float[Tensor, "3 height width"]:
    """The short side resized to `image_px` (bicubic, antialiased), then the centre square.

    Equals torchvision's Resize followed by CenterCrop (LAVIS instead squashes the picture to a square).
    """
    # Resized whole, a strip of 1 × 100,000 would take gigabytes: beyond this shape only its middle is.
    longest = _STRIP_RATIO * min(image.size)
    if max(image.size) > longest:
        image = _centre(image, min(image.width, longest), min(image.height, longest))
    size_px, short = config.image_px, min(image.size)
    width, height = (int(size_px * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _normalise(_centre(image, size_px, size_px), config)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _random_crop(width: int, height: int, scale: tuple[float, float], generator: np.random.Generator) -> Box:
    """A box (left, top, right, bottom) of random area and shape; the largest centred one after ten misses."""
    low, high = (math.log(ratio) for ratio in _CROP_RATIO)
    for _ in range(_CROP_TRIES):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    ratio = min(max(width / height, _CROP_RATIO[0]), _CROP_RATIO[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _normalise(image: Image.Image, config: TransformConfig) -> Float[Tensor, "3 height width"]:
    assert config.mean is not None and config.std is not None, "transform_for fills them in"
    pixels = rearrange(torch.from_numpy(np.array(image)), "height width channel -> channel height width")
    mean, std = (rearrange(torch.tensor(value), "channel -> channel 1 1") for value in (config.mean, config.std))
    # In place: at this size a new tensor for each step takes as long as the step.
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
