"""The Python contract: `qformers.load` and what a loaded model can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from qformers.data.images import load_image
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import evaluation_transform, transform_for
from qformers.errors import DataError
from qformers.evaluation.scoring import PICTURES_AT_ONCE, itc_similarities, match_logits, text_features
from qformers.models.config import ModelConfig
from qformers.models.inspection import cross_attention_weights
from qformers.models.saving import TOKENIZER_FOLDER, load_model, model_folder, save_model
from qformers.models.stage1 import Stage1Model

Picture = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class EncodedImages:
    """Pictures after the frozen encoder, after the Q-Former, and projected for ITC (L2-normalised)."""

    patch_embeds: Float[Tensor, "images patches vision_dim"]
    query_outputs: Float[Tensor, "images queries dim"]
    features: Float[Tensor, "images queries embed_dim"]


@dataclass(frozen=True)
class EncodedTexts:
    """Texts projected for ITC (L2-normalised)."""

    features: Float[Tensor, "texts embed_dim"]


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Predictor:
    """The model saved in `path`: a run folder, or what `save_pretrained` wrote.

    Args:
        dtype: of all weights; by default the Q-Former is in float32 and the frozen encoder as it was saved.

    Raises:
        CheckpointError: no such model, or damaged files.
    """
    model, config = load_model(path)
    model = model.to(device, dtype)
    return Predictor(model, config, CaptionTokenizer.from_pretrained(model_folder(path) / TOKENIZER_FOLDER))


class Predictor:
    """A stage-1 model with its preprocessing. Everything takes one item or many and batches inside."""

    def __init__(self, model: Stage1Model, config: ModelConfig, tokenizer: CaptionTokenizer) -> None:
        self.model = model.eval()
        self.config = config
        self.tokenizer = tokenizer
        self.transform = transform_for(model.vision_encoder)

    @property
    def device(self) -> torch.device:
        return self.model.temperature.device

    def preprocess(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "images 3 height width"]:
        """Pictures as the encoder wants them: shorter side resized, centre cropped, normalised.

        Raises:
            DataError: a picture that cannot be read, by name.
        """
        return torch.stack([evaluation_transform(self._open(image), self.transform) for image in _many(images)])

    @torch.inference_mode()
    def encode_image(self, pixel_values: Float[Tensor, "images 3 height width"]) -> EncodedImages:
        """What `preprocess` gave, through the frozen encoder and the Q-Former."""
        parts = []
        for pixels in pixel_values.split(PICTURES_AT_ONCE):
            patches = self.model.vision_encoder(pixels.to(self.device))
            encoding = self.model.encode_image(patches)
            parts.append((patches, encoding.query_outputs, encoding.image_features))
        return EncodedImages(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def encode_text(self, texts: str | Sequence[str]) -> EncodedTexts:
        """ITC features of texts.

        Raises:
            DataError: an empty text.
        """
        return EncodedTexts(text_features(self.model, self.tokenizer.encode, self._texts(texts)).to(self.device))

    def itc(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Float[Tensor, "images texts"]:
        """Cosine similarity of every picture with every text, max over the queries."""
        encoded = self.encode_image(self.preprocess(images))
        return itc_similarities(encoded.features, self.encode_text(texts).features)

    def match(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Float[Tensor, " pairs"]:
        """Probability (0–1) that picture and text match, pair by pair; a single picture is judged against all texts.

        Raises:
            DataError: several pictures and another number of texts.
        """
        pictures, words = _many(images), self._texts(texts)
        shown = np.zeros(len(words), dtype=np.int64) if len(pictures) == 1 else np.arange(len(pictures))
        if len(shown) != len(words):
            raise DataError(
                f"{len(pictures)} pictures and {len(words)} texts: match needs one text per picture, or one picture"
            )
        patches = self.encode_image(self.preprocess(pictures)).patch_embeds
        pairs = (shown, np.arange(len(words)))
        logits = match_logits(self.model, self.tokenizer.encode, lambda row: patches[row : row + 1], words, pairs)
        return logits.softmax(dim=-1)[:, 1]

    def attention(self, image: Picture, text: str | None = None) -> Float[Tensor, "layers queries rows columns"]:
        """How much each query looks at each patch of the grid, per cross-attending block, mean over heads.

        With `text` the queries read it at the same time, as in ITM. What falls on tokens that are no patch
        ([CLS]) is left out, so a map sums to at most 1.
        """
        encoder = self.model.vision_encoder
        patches = encoder(self.preprocess(image).to(self.device))
        tokens = None
        if text is not None:
            input_ids, attention_mask = self.tokenizer.encode(self._texts(text))
            tokens = (input_ids.to(self.device), attention_mask.to(self.device))
        weights = cross_attention_weights(self.model, patches, tokens)[..., encoder.prefix_tokens :]
        return rearrange(weights, "layers queries (rows columns) -> layers queries rows columns", rows=encoder.grid)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write safetensors, config, tokenizer and model card; `qformers.load` reads them back bit for bit."""
        save_model(self.model, self.config, self.tokenizer, Path(folder))

    def _open(self, image: Picture) -> Image.Image:
        return load_image(Image.fromarray(image) if isinstance(image, np.ndarray) else image)

    def _texts(self, texts: str | Sequence[str]) -> list[str]:
        words = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(words):
            if not text.strip():
                raise DataError(f"text {number + 1} of {len(words)} is empty: say what to look for")
        return words


def _many(images: Picture | Sequence[Picture]) -> list[Picture]:
    single = isinstance(images, str | Path | bytes | Image.Image | np.ndarray)
    return [images] if single else list(images)
