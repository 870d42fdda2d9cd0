"""What scores captions against their picture: our own ITC, or a CLIP-type dual encoder of Hugging Face's."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from qformers.capfilt.encoding import (
    EncodesPictures,
    OwnTransform,
    PictureTransform,
    ProcessorTransform,
    image_processor,
    is_ours,
    own_encoder_key,
    weights_dtype,
)
from qformers.data.text import clean_caption
from qformers.data.transforms import transform_for
from qformers.errors import CheckpointError, ConfigError
from qformers.evaluation.scoring import match_logits, text_features
from qformers.models.tensors import fingerprint
from qformers.models.vision import one_line, quiet_loading
from qformers.predictor import load

Scores = list[list[float]]  # of each picture, one for each of its texts


@runtime_checkable
class Ranker(EncodesPictures, Protocol):
    """Scores how well texts fit their picture; more is better. `fingerprint` is of all weights that have a part."""

    fingerprint: str

    def score(self, encoded: Tensor, texts: list[list[str]]) -> Scores:
        """Of pictures that `encode` gave, each against its own texts."""
        ...


def open_ranker(source: str, device: str) -> Ranker:
    """The ranker of a run, a saved model, a folder or a hub id.

    Raises:
        ConfigError: nothing there, or no dual encoder. CheckpointError: damaged, or of stage 2.
    """
    return OwnRanker(source, device) if is_ours(source) else DualEncoder(source, device)


class OwnRanker:
    """A stage-1 model: `score` is ITC's cosine similarity, max over the queries; `match` its ITM head's probability."""

    def __init__(self, source: str, device: str) -> None:
        self.predictor = load(source, device, weights_dtype(device))
        self.model = self.predictor.loaded.stage1()
        self.encode_texts = self.predictor.tokenizer.encode
        self.device = device
        self.transform: PictureTransform = OwnTransform(transform_for(self.model.vision_encoder))
        self.encoder_key = own_encoder_key(self.model.vision_encoder)
        self.fingerprint = fingerprint(self.model.state_dict())

    @torch.inference_mode()
    def encode(self, pixel_values: Float[Tensor, "pictures 3 height width"]) -> Tensor:
        return self.model.vision_encoder(pixel_values.to(self.device))

    @torch.inference_mode()
    def score(self, encoded: Tensor, texts: list[list[str]]) -> Scores:
        words, images = _flat(texts)
        if not words:
            return [[] for _ in texts]
        pictures = self.model.encode_image(encoded.to(self.device)).image_features.cpu()
        features = text_features(self.model, self.encode_texts, words)
        cosines = einsum(pictures[images], features, "pairs queries dim, pairs dim -> pairs queries")
        return _by_picture(cosines.amax(dim=-1), texts)

    @torch.inference_mode()
    def match(self, encoded: Tensor, texts: list[list[str]]) -> Scores:
        """Probability (0–1) of a match by the ITM head, of each picture with its texts."""
        words, images = _flat(texts)
        if not words:
            return [[] for _ in texts]
        pairs = np.array(images), np.arange(len(words))
        logits = match_logits(self.model, lambda rows: encoded[rows], self.encode_texts(words), pairs)
        return _by_picture(logits.softmax(dim=-1)[:, 1], texts)


class DualEncoder:
    """CLIP, SigLIP or another model that embeds pictures and texts alike: `score` is the cosine of the two."""

    def __init__(self, source: str, device: str) -> None:
        image_processor(source)
        try:
            with quiet_loading():
                self.model: Any = AutoModel.from_pretrained(
                    source, dtype=weights_dtype(device) or "auto", trust_remote_code=False
                ).to(cast(Any, device))
                self.tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{source}: no ranker can be read from here ({one_line(error)})") from error
        kind = self.model.config.model_type
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ConfigError(
                f"{source}: {kind} does not embed pictures and texts alike: give a CLIP or SigLIP, or a stage-1 run"
            )
        self.max_tokens = int(self.model.config.get_text_config().max_position_embeddings)
        # SigLIP was trained on texts padded to the whole length, and sees the padding.
        self.sees_padding = kind.startswith("siglip")
        self.device = device
        self.transform: PictureTransform = ProcessorTransform(source)
        self.encoder_key = f"dual encoder {source}"
        self.fingerprint = fingerprint(self.model.state_dict())

    @torch.inference_mode()
    def encode(self, pixel_values: Float[Tensor, "pictures 3 height width"]) -> Tensor:
        features = self.model.get_image_features(pixel_values=pixel_values.to(self.device, self.model.dtype))
        return F.normalize(features.pooler_output.float(), dim=-1)

    @torch.inference_mode()
    def score(self, encoded: Tensor, texts: list[list[str]]) -> Scores:
        words, images = _flat(texts)
        if not words:
            return [[] for _ in texts]
        padding = "max_length" if self.sees_padding else True
        read = self.tokenizer(
            words, padding=padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        names = ("input_ids",) if self.sees_padding else ("input_ids", "attention_mask")
        features = self.model.get_text_features(**{name: read[name] for name in names}).pooler_output
        features = F.normalize(features.float(), dim=-1)
        scores = einsum(encoded[images], features, "pairs dim, pairs dim -> pairs")
        return _by_picture(scores.cpu(), texts)


def _flat(texts: list[list[str]]) -> tuple[list[str], list[int]]:
    """All texts, cleaned as in training, and the picture of each."""
    words = [clean_caption(text) for of_picture in texts for text in of_picture]
    return words, [image for image, of_picture in enumerate(texts) for _ in of_picture]


def _by_picture(scores: Float[Tensor, " pairs"], texts: list[list[str]]) -> Scores:
    return [part.tolist() for part in scores.split([len(of_picture) for of_picture in texts])]
