"""Image-text retrieval: recall and median rank in both directions."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qformers.errors import DataError


def retrieval_metrics(
    similarities: Float[np.ndarray | Tensor, "images texts"],
    text_to_image: Int[np.ndarray | Tensor, " texts"],
    t2i_similarities: Float[np.ndarray | Tensor, "images texts"] | None = None,
) -> dict[str, float]:
    """Recall at 1, 5 and 10, their mean, and the median rank, from images to texts and from texts to images.

    `text_to_image[t]` is the row of the image that text `t` describes; an image may have many texts, and
    its rank is that of its best-placed one (the convention of the COCO and Flickr30K retrieval tables,
    PAPER.md section 6). `t2i_similarities`, when re-ranking made them differ, are used for text to image.

    Recalls are fractions 0-1; ranks start at 1. A candidate that ties with a right one counts as placed
    before it, so the figures do not depend on the order of the candidates and a constant score earns nothing.
    Images without a text are candidates only. Raises DataError on NaN and on rows that do not exist.
    """
    i2t = checked(similarities, "image-to-text")
    t2i = i2t if t2i_similarities is None else checked(t2i_similarities, "text-to-image")
    owners = checked_owners(text_to_image, i2t.shape)
    if t2i.shape != i2t.shape:
        raise DataError(f"similarities are {i2t.shape} from image to text and {t2i.shape} from text to image")
    return metrics_of_ranks(image_ranks(i2t, owners), text_ranks(t2i, owners))


def metrics_of_ranks(i2t: Int[np.ndarray, " images"], t2i: Int[np.ndarray, " texts"]) -> dict[str, float]:
    """Recall at 1, 5 and 10 and median rank of both directions, and the mean of the six recalls."""
    metrics: dict[str, float] = {}
    for direction, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            metrics[f"{direction}_r{k}"] = float(np.mean(ranks <= k))
        metrics[f"{direction}_median_rank"] = float(np.median(ranks))
    recalls = [value for name, value in metrics.items() if not name.endswith("median_rank")]
    metrics["mean_recall"] = float(np.mean(recalls))
    return metrics


def chance_metrics(images: int, text_to_image: Int[np.ndarray | Tensor, " texts"]) -> dict[str, float]:
    """The recalls that a random order of the candidates reaches on average, with `retrieval_metrics`' keys."""
    owners = to_numpy(text_to_image)
    texts_of_image = np.unique(owners, return_counts=True)[1].tolist()
    metrics: dict[str, float] = {}
    for k in (1, 5, 10):
        drawn = min(k, owners.size)
        misses = [math.comb(owners.size - own, drawn) / math.comb(owners.size, drawn) for own in texts_of_image]
        metrics[f"i2t_r{k}"] = 1 - float(np.mean(misses))
    metrics.update({f"t2i_r{k}": min(k, images) / images for k in (1, 5, 10)})
    metrics["mean_recall"] = float(np.mean(list(metrics.values())))
    return metrics


def text_ranks(
    similarities: Float[np.ndarray, "images texts"], owners: Int[np.ndarray, " texts"]
) -> Int[np.ndarray, " texts"]:
    """Rank of each text's image, from 1."""
    right = similarities[owners, np.arange(owners.size)]
    return (similarities >= right).sum(axis=0)


def image_ranks(
    similarities: Float[np.ndarray, "images texts"], owners: Int[np.ndarray, " texts"]
) -> Int[np.ndarray, " captioned"]:
    """Rank of the best own text of each image that has one, among the *other* images' texts: own texts never push
    each other down."""
    ranks = []
    for image in np.unique(owners):
        own = owners == image
        best = similarities[image, own].max()
        ranks.append(1 + int((similarities[image, ~own] >= best).sum()))
    return np.array(ranks)


def checked(similarities: np.ndarray | Tensor, name: str) -> np.ndarray:
    """`similarities` as an array of two axes. Raises DataError where it is empty or holds NaN."""
    array = to_numpy(similarities)
    if array.ndim != 2 or array.size == 0:
        raise DataError(f"{name} similarities must be images x texts and not empty, got shape {array.shape}")
    if np.isnan(array).any():
        unusable = np.count_nonzero(np.isnan(array))
        raise DataError(f"{unusable} of {array.size} {name} similarities are NaN: recall would mean nothing")
    return array


def checked_owners(text_to_image: np.ndarray | Tensor, shape: tuple[int, ...]) -> Int[np.ndarray, " texts"]:
    """`text_to_image` as an array. Raises DataError unless it holds one existing image for each text."""
    owners, (images, texts) = to_numpy(text_to_image), shape
    if owners.shape != (texts,):
        raise DataError(
            f"similarities are {shape} (images, texts), but text_to_image has shape {owners.shape}: every text needs "
            "exactly one image"
        )
    if owners.min() < 0 or owners.max() >= images:
        raise DataError(f"text_to_image must hold rows 0 to {images - 1}, got rows {owners.min()} to {owners.max()}")
    return owners


def to_numpy(values: np.ndarray | Tensor) -> np.ndarray:
    """The same values; half precision, which numpy lacks or computes badly in, as float32."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu")
        return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)
