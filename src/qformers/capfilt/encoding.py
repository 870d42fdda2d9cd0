"""How pictures enter the captioner and the ranker, and when one image encoder's pass serves both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from qformers.convert.checkpoint import local_folder
from qformers.convert.huggingface import CONFIGS, read_config
from qformers.convert.run import PICKLES
from qformers.data.config import TransformConfig
from qformers.data.transforms import evaluation_transform
from qformers.errors import CheckpointError, ConfigError
from qformers.models.saving import FORMATS, model_folder
from qformers.models.vision import VisionEncoder, one_line, quiet_loading


@runtime_checkable
class PictureTransform(Protocol):
    """Picture → pixels of one model. Equal ones give equal pixels; it travels to the processes that read pictures."""

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]: ...


@dataclass(frozen=True)
class OwnTransform:
    """The evaluation transform of a model of ours."""

    config: TransformConfig

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        return evaluation_transform(image, self.config)


@dataclass(frozen=True)
class ProcessorTransform:
    """The image processor that a Hugging Face model's folder or hub id comes with."""

    source: str

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        return image_processor(self.source)(images=image, return_tensors="pt")["pixel_values"][0]


@lru_cache(maxsize=4)
def image_processor(source: str) -> Any:
    """The Pillow-backed image processor of a folder or hub id.

    Raises:
        CheckpointError: there is none. ConfigError: it gives something else than pixels of one size.
    """
    try:
        with quiet_loading():
            processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{source}: its image processor cannot be read ({one_line(error)})") from error
    try:
        given = list(processor(images=[Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))], return_tensors="pt"))
    except ValueError:
        given = ["pictures of different sizes"]
    if given != ["pixel_values"]:
        raise ConfigError(
            f"{source}: its image processor gives {', '.join(given)}, needed are pixels of one size alone"
        )
    return processor


@runtime_checkable
class EncodesPictures(Protocol):
    """A captioner or ranker as far as pictures go."""

    transform: PictureTransform
    encoder_key: str
    """Equal keys: `encode` gives the same, so once is enough."""

    def encode(self, pixel_values: Float[Tensor, "pictures 3 height width"]) -> Tensor: ...


def own_encoder_key(encoder: VisionEncoder) -> str:
    """Of the patch embeddings that a frozen encoder of ours gives: its weights, layer, size and normalisation."""
    facts = (encoder.fingerprint(), encoder.layer, encoder.image_px, encoder.mean, encoder.std)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def is_ours(source: str) -> bool:
    """Whether `qformers.load` opens `source`: a model of ours, a BLIP-2 of Hugging Face's or a .pth of the authors.

    Raises:
        ConfigError: nothing there. CheckpointError: no config.json.
    """
    if source.endswith(PICKLES):
        return True
    config = read_config(model_folder(local_folder(source, weights=False)))
    return config.get("format") in FORMATS.values() or config.get("model_type") in CONFIGS


def weights_dtype(device: str) -> torch.dtype | None:
    """On a CPU float32, so that a near-tie is not turned by the rest of the batch; on a GPU as they were saved."""
    return torch.float32 if torch.device(device).type == "cpu" else None
