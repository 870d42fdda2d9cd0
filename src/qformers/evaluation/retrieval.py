"""Image-text retrieval: recall in both directions, and re-ranking of the best candidates by the ITM head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qformers.errors import ConfigError, DataError

RERANKING_RULES = ("itm+itc", "itm", "itm+itc/temperature")
ScorePairs = Callable[[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]], "np.ndarray | Tensor"]


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
    i2t = _checked(similarities, "image-to-text")
    t2i = i2t if t2i_similarities is None else _checked(t2i_similarities, "text-to-image")
    owners = _to_numpy(text_to_image)
    if t2i.shape != i2t.shape or owners.shape != (i2t.shape[1],):
        raise DataError(
            f"similarities are {i2t.shape} (images, texts) and {t2i.shape}, but text_to_image has shape "
            f"{owners.shape}: every text needs exactly one image"
        )
    if owners.size == 0 or owners.min() < 0 or owners.max() >= i2t.shape[0]:
        raise DataError(
            f"text_to_image must hold rows 0 to {i2t.shape[0] - 1} and at least one text, got {owners.size} "
            f"texts{f' with rows {owners.min()} to {owners.max()}' if owners.size else ''}"
        )
    i2t_ranks, t2i_ranks = _image_ranks(i2t, owners), _text_ranks(t2i, owners)
    metrics: dict[str, float] = {}
    for direction, ranks in (("i2t", i2t_ranks), ("t2i", t2i_ranks)):
        for k in (1, 5, 10):
            metrics[f"{direction}_r{k}"] = float(np.mean(ranks <= k))
        metrics[f"{direction}_median_rank"] = float(np.median(ranks))
    recalls = [value for name, value in metrics.items() if not name.endswith("median_rank")]
    metrics["mean_recall"] = float(np.mean(recalls))
    return metrics


def chance_metrics(images: int, text_to_image: Int[np.ndarray | Tensor, " texts"]) -> dict[str, float]:
    """The recalls that a random order of the candidates reaches on average, with `retrieval_metrics`' keys."""
    owners = _to_numpy(text_to_image)
    texts_of_image = np.unique(owners, return_counts=True)[1].tolist()
    metrics: dict[str, float] = {}
    for k in (1, 5, 10):
        drawn = min(k, owners.size)
        misses = [math.comb(owners.size - own, drawn) / math.comb(owners.size, drawn) for own in texts_of_image]
        metrics[f"i2t_r{k}"] = 1 - float(np.mean(misses))
    metrics.update({f"t2i_r{k}": min(k, images) / images for k in (1, 5, 10)})
    metrics["mean_recall"] = float(np.mean(list(metrics.values())))
    return metrics


def _text_ranks(similarities: np.ndarray, owners: np.ndarray) -> np.ndarray:
    right = similarities[owners, np.arange(owners.size)]
    return (similarities >= right).sum(axis=0)


def _image_ranks(similarities: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Rank of the best own text among the *other* images' texts: own texts never push each other down."""
    ranks = []
    for image in np.unique(owners):
        own = owners == image
        best = similarities[image, own].max()
        ranks.append(1 + int((similarities[image, ~own] >= best).sum()))
    return np.array(ranks)


@dataclass(frozen=True)
class RerankedSimilarities:
    """Ranking scores, images x texts, one matrix per direction, and how many pairs the ITM head scored."""

    i2t: Float[np.ndarray, "images texts"]
    t2i: Float[np.ndarray, "images texts"]
    scored_pairs: int


def rerank_similarities(
    similarities: Float[np.ndarray | Tensor, "images texts"],
    score_pairs: ScorePairs,
    k: int = 128,
    rule: str = "itm+itc",
    temperature: float = 1.0,
) -> RerankedSimilarities:
    """Re-rank the `k` best candidates of every image and of every text by the ITM score.

    `score_pairs(image_indices, text_indices)` gives the ITM match logit of each pair. It is called once, with
    the union of both directions' shortlists sorted by image, so that no pair is scored twice and an
    image's keys and values can be shared over its texts. Candidates outside a shortlist keep their ITC
    order below all re-ranked ones. PAPER.md section 5: k = 128; "itm+itc" adds the raw cosine as the authors'
    code does, "itm" is the paper's sentence, and "itm+itc/temperature" adds the cosine over the model's
    `temperature`: both are then logits, and a short run's ITM does not drown its better ITC. Equal ITC
    similarities enter a shortlist by lowest index.
    """
    if rule not in RERANKING_RULES:
        raise ConfigError(f"re-ranking rule {rule!r} is unknown: use one of {', '.join(RERANKING_RULES)}")
    if k < 1:
        raise ConfigError(f"re-ranking needs at least 1 candidate, got k={k}")
    itc = _checked(similarities, "ITC").astype(np.float64)
    if not np.isfinite(itc).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(itc))} of {itc.size} ITC similarities are not finite")
    texts_of_image, images_of_text = _shortlist(itc, k), _shortlist(itc.T, k).T
    image_indices, text_indices = np.nonzero(texts_of_image | images_of_text)
    scores = _to_numpy(score_pairs(image_indices, text_indices)).astype(np.float64)
    if scores.shape != image_indices.shape:
        raise DataError(f"{image_indices.size} pairs were given to the ITM head, {scores.shape} scores came back")
    if not np.isfinite(scores).all():
        unusable = np.count_nonzero(~np.isfinite(scores))
        raise DataError(f"{unusable} of {scores.size} ITM scores are not finite: the ranking would mean nothing")
    if rule != "itm":
        scores = scores + itc[image_indices, text_indices] / (temperature if rule == "itm+itc/temperature" else 1.0)
    itm = np.full(itc.shape, -np.inf)
    itm[image_indices, text_indices] = scores
    return RerankedSimilarities(
        i2t=_place_above(itm, itc, texts_of_image, axis=1),
        t2i=_place_above(itm, itc, images_of_text, axis=0),
        scored_pairs=int(image_indices.size),
    )


def _shortlist(similarities: np.ndarray, k: int) -> np.ndarray:
    """True at the `k` largest of each row."""
    chosen = np.zeros(similarities.shape, dtype=bool)
    best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def _place_above(itm: np.ndarray, itc: np.ndarray, shortlist: np.ndarray, axis: int) -> np.ndarray:
    """ITM scores in the shortlist; below them the rest, ITC moved down by one constant for each query."""
    lowest = np.where(shortlist, itm, np.inf).min(axis=axis, keepdims=True)
    highest_rest = np.where(shortlist, -np.inf, itc).max(axis=axis, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(highest_rest), highest_rest - lowest + 1.0, 0.0)
    return np.where(shortlist, itm, itc - shift)


def _checked(similarities: np.ndarray | Tensor, name: str) -> np.ndarray:
    array = _to_numpy(similarities)
    if array.ndim != 2 or array.size == 0:
        raise DataError(f"{name} similarities must be images x texts and not empty, got shape {array.shape}")
    if np.isnan(array).any():
        unusable = np.count_nonzero(np.isnan(array))
        raise DataError(f"{unusable} of {array.size} {name} similarities are NaN: recall would mean nothing")
    return array


def _to_numpy(values: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu")
        return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)
