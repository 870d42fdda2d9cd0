"""What a linear map reaches: ridge regression from frozen image features to frozen sentence embeddings.

The Q-Former of the demo is set beside it, fitted in the same run on the same split and features. The baseline
gets its best honest chance: its penalty, the centring of its embeddings and the part of the training data it
learns from are chosen on a validation part, and it is then fitted again with the validation part added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.errors import DataError
from qformers.evaluation.retrieval import retrieval_metrics

PENALTIES = tuple(float(value) for value in np.logspace(-5, 2, 29))


def pool_patches(patch_embeds: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch twice_dim"]:
    """One vector for each image: its [CLS] token beside the mean of its other patches, in fp32."""
    patch_embeds = patch_embeds.float()
    return torch.cat([patch_embeds[:, 0], patch_embeds[:, 1:].mean(dim=1)], dim=1)


def embed_sentences(texts: Sequence[str], folder: str | Path, batch_size: int = 64) -> Float[Tensor, "texts dim"]:
    """Sentence embeddings of a BERT folder: the mean over token states, L2-normalised.

    As sentence-transformers does for all-MiniLM-L6-v2 (mean pooling over real tokens, then normalise).
    """
    from transformers import AutoModel, AutoTokenizer

    from qformers.models.vision import quiet_loading

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with quiet_loading():
        model = AutoModel.from_pretrained(folder).eval()
    # Each text once, and texts of similar length in one batch, so little of it is padding.
    distinct = sorted(set(texts), key=len)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            mask = inputs["attention_mask"].unsqueeze(-1)
            states = model(**inputs).last_hidden_state
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            parts.append(torch.nn.functional.normalize(means, dim=1))
    row = {text: number for number, text in enumerate(distinct)}
    return torch.cat(parts)[[row[text] for text in texts]]


@dataclass(frozen=True)
class RetrievalSet:
    """Pooled image features, sentence embeddings, and which image each text belongs to."""

    image_features: Float[Tensor, "images dim"]
    text_embeds: Float[Tensor, "texts embed_dim"]
    text_to_image: Int[Tensor, " texts"]

    def targets(self) -> Float[Tensor, "images embed_dim"]:
        """The mean embedding of each image's texts. DataError when an image has none."""
        counts = torch.bincount(self.text_to_image, minlength=len(self.image_features))
        if (counts == 0).any():
            raise DataError(f"{int((counts == 0).sum())} of {len(counts)} training images have no text")
        sums = torch.zeros(len(self.image_features), self.text_embeds.shape[1], dtype=torch.float64)
        sums.index_add_(0, self.text_to_image, self.text_embeds.double())
        return sums / counts.unsqueeze(-1)

    def subset(self, keep: Bool[Tensor, " images"]) -> RetrievalSet:
        """The images that are True in `keep`, with their texts."""
        rows = keep.cumsum(dim=0) - 1
        texts = keep[self.text_to_image]
        return RetrievalSet(self.image_features[keep], self.text_embeds[texts], rows[self.text_to_image[texts]])

    def joined(self, other: RetrievalSet) -> RetrievalSet:
        """Both sets as one, this one's images first."""
        return RetrievalSet(
            torch.cat([self.image_features, other.image_features]),
            torch.cat([self.text_embeds, other.text_embeds]),
            torch.cat([self.text_to_image, other.text_to_image + len(self.image_features)]),
        )


@dataclass(frozen=True)
class Ridge:
    """A fitted linear map, the settings that were chosen, and what they reached on the validation part."""

    weight: Float[Tensor, "dim embed_dim"]
    feature_mean: Float[Tensor, " dim"]
    feature_scale: Float[Tensor, " dim"]
    text_mean: Float[Tensor, " embed_dim"]
    penalty: float  # as a fraction of the number of training images
    centred: bool
    validation: dict[str, float]

    @property
    def validation_score(self) -> tuple[float, float]:
        """What choices are made by: R@1 over both directions; equal R@1 is settled by the mean of all recalls."""
        return self.validation["i2t_r1"] + self.validation["t2i_r1"], self.validation["mean_recall"]


def solve_ridge(
    features: Float[Tensor, "images dim"],
    targets: Float[Tensor, "images embed_dim"],
    penalties: Iterable[float],
) -> list[Float[Tensor, "dim embed_dim"]]:
    """Minimisers of |XW − Y|² + penalty · images · |W|², one for each penalty, from one eigendecomposition in float64.

    Solves the primal (dim × dim) or the dual (images × images) system, whichever is smaller.
    """
    features, targets = features.double(), targets.double()
    images, dim = features.shape
    primal = dim <= images
    gram = features.T @ features if primal else features @ features.T
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    right_side = eigenvectors.T @ (features.T @ targets if primal else targets)
    left_side = eigenvectors if primal else features.T @ eigenvectors
    return [left_side @ (right_side / (eigenvalues + penalty * images)[:, None]) for penalty in penalties]


def fit_ridge(train: RetrievalSet, validation: RetrievalSet, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Fit on `train`, choose penalty and centring by `validation_score`, refit on both.

    Features are standardised with the statistics of the part they are fitted on.
    """
    fitted = [
        replace(ridge, validation=retrieval_metrics(_similarities(ridge, validation), validation.text_to_image))
        for ridge in _fit_all(train, penalties)
    ]
    best = max(fitted, key=lambda ridge: ridge.validation_score)
    refitted = _fit_all(train.joined(validation), [best.penalty])
    chosen = next(ridge for ridge in refitted if ridge.centred == best.centred)
    return replace(chosen, validation=best.validation)


def fit_best_ridge(parts: Iterable[RetrievalSet], validation: RetrievalSet) -> Ridge:
    """`fit_ridge` on each candidate part of the training data, and of those the best on the validation part.

    More training data is not always better for a linear map: scenes blur what it learns about single things.
    """
    return max((fit_ridge(part, validation) for part in parts), key=lambda ridge: ridge.validation_score)


def _fit_all(train: RetrievalSet, penalties: Sequence[float]) -> list[Ridge]:
    features, targets = train.image_features.double(), train.targets()
    feature_mean, text_mean = features.mean(dim=0), targets.mean(dim=0)
    feature_scale = features.std(dim=0, correction=0).clamp_min(1e-6)
    weights = solve_ridge((features - feature_mean) / feature_scale, targets - text_mean, penalties)
    return [
        Ridge(weight, feature_mean, feature_scale, text_mean, penalty, centred, {})
        for penalty, weight in zip(penalties, weights, strict=True)
        for centred in (True, False)
    ]


def ridge_similarities(
    ridge: Ridge,
    image_features: Float[Tensor, "images dim"],
    text_embeds: Float[Tensor, "texts embed_dim"],
) -> Float[Tensor, "images texts"]:
    """Cosine of each image's predicted embedding with each text's, both centred if that was chosen."""
    features = (image_features.double() - ridge.feature_mean) / ridge.feature_scale
    predicted = features @ ridge.weight  # of centred targets
    texts = text_embeds.double()
    if ridge.centred:
        texts = texts - ridge.text_mean
    else:
        predicted = predicted + ridge.text_mean
    normalize = torch.nn.functional.normalize
    return normalize(predicted, dim=1) @ normalize(texts, dim=1).T


def _similarities(ridge: Ridge, part: RetrievalSet) -> Float[Tensor, "images texts"]:
    return ridge_similarities(ridge, part.image_features, part.text_embeds)
