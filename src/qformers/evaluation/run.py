"""A stage-1 model on captioned pictures: ITC alone, and re-ranked by the ITM head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from qformers.convert.run import open_model
from qformers.data.config import SourceConfig
from qformers.data.dataset import CaptionDataset
from qformers.data.features import records_fingerprint
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import transform_for
from qformers.errors import CheckpointError, DataError
from qformers.evaluation.pictures import patch_batches, patches_of
from qformers.evaluation.rerank import Reranked, Rule, check_rule, likeliest_itm_weight, rerank
from qformers.evaluation.retrieval import metrics_of_ranks, retrieval_metrics, to_numpy
from qformers.evaluation.score_file import ScoreFile, score_key
from qformers.evaluation.scoring import Pairs, TextBatch, image_features, itc_similarities, match_parts, text_features
from qformers.models.stage1 import Stage1Model
from qformers.models.tensors import fingerprint


@dataclass(frozen=True)
class Reranking:
    """How to re-rank: the `k` best by ITC, by `rule` (`itm_weight` is of "itm+itc/temperature"); `scores` is the file
    that keeps ITM logits, if any."""

    k: int = 128
    rule: Rule = "itm+itc"
    scores: str | Path | None = None
    itm_weight: float = 1.0


@dataclass(frozen=True)
class RetrievalScores:
    """What a model thinks of every (picture, text) pair of a data set, and how it was re-ranked."""

    texts: list[str]
    text_to_image: Int[np.ndarray, " texts"]
    itc: Float[Tensor, "images texts"]
    reranked: Reranked | None
    how: Reranking | None

    def metrics(self) -> dict[str, float]:
        """`retrieval_metrics` of ITC alone."""
        return retrieval_metrics(self.itc, self.text_to_image)

    def reranked_metrics(self) -> dict[str, float]:
        """The same figures after re-ranking; empty without it."""
        return {} if self.reranked is None else metrics_of_ranks(self.reranked.i2t.ranks, self.reranked.t2i.ranks)


def evaluate_retrieval(
    model_path: str, source: SourceConfig, reranking: Reranking | None = None, captions_per_image: int | None = None
) -> dict[str, float]:
    """Recall of the model saved in `model_path` on `source`, every caption and every picture a query.

    Figures after re-ranking are under `reranked_*` keys. `captions_per_image` = n leaves out all but the first n
    captions of each record: five in the tables of COCO and Flickr30K.

    Raises:
        CheckpointError: no model there. ConfigError: an unknown rule. DataError: as `score_retrieval`.
    """
    if reranking is not None:
        check_rule(reranking.rule)
    loaded = open_model(model_path)
    model = loaded.stage1()
    if loaded.tokenizer is None:
        raise CheckpointError(f"{model_path}: has no tokenizer: put a BERT's files beside the weights")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = CaptionTokenizer.from_pretrained(loaded.tokenizer)
    dataset = CaptionDataset(open_source(source), tokenizer, transform_for(model.vision_encoder), train=False)
    scores = score_retrieval(model, dataset, reranking, captions_per_image)
    counts = {"images": float(scores.itc.shape[0]), "texts": float(scores.itc.shape[1])}
    reranked = {f"reranked_{name}": value for name, value in scores.reranked_metrics().items()}
    return counts | scores.metrics() | reranked


def score_retrieval(
    model: Stage1Model,
    dataset: CaptionDataset,
    reranking: Reranking | None = None,
    captions_per_image: int | None = None,
) -> RetrievalScores:
    """ITC similarities of all pairs of `dataset`, and with `reranking` the best of them re-ranked.

    Patch embeddings are never all in memory: to re-rank, pictures are read and encoded a second time, a few at a
    time, which is little work beside scoring their candidates. ITC's similarities are (4 bytes a pair).

    `rule` is one of `retrieval.RERANKING_RULES`.

    Raises:
        DataError: a picture is broken or a caption empty; leaving out a candidate would flatter the figures.
    """
    captions, tokenizer = dataset.captions(captions_per_image), dataset.tokenizer
    assert isinstance(tokenizer, CaptionTokenizer), "retrieval compares texts of the Q-Former's own tokenizer"
    if captions.empty:
        raise DataError(f"{len(captions.empty)} captions are empty, such as that of {captions.empty[0]}: mend them")
    if not captions.texts:
        raise DataError("the data set has no captions: retrieval needs texts")
    device = model.temperature.device
    batches = patch_batches(model.vision_encoder, dataset.images())
    images = image_features(model, (patches.to(device) for patches in batches))
    similarities = itc_similarities(images, text_features(model, tokenizer.encode, captions.texts))
    reranked = None
    if reranking is not None:
        reranked = rerank(
            similarities,
            captions.text_to_image,
            lambda image, text: _match_logits(model, dataset, captions.texts, (image, text), reranking.scores),
            k=reranking.k,
            rule=reranking.rule,
            temperature=model.temperature.item(),
            itm_weight=reranking.itm_weight,
        )
    return RetrievalScores(captions.texts, captions.text_to_image, similarities, reranked, reranking)


def best_itm_weight(model: Stage1Model, validation: CaptionDataset, k: int) -> float:
    """The weight of ITM beside ITC (rule "itm+itc/temperature") that the pictures and texts of `validation` speak for:
    `likeliest_itm_weight` of the pairs that re-ranking their `k` best scores."""
    found = score_retrieval(model, validation)
    log_odds = np.full(found.itc.shape, -np.inf)

    def scored(images: np.ndarray, texts: np.ndarray) -> Float[np.ndarray, "pairs 2"]:
        logits = _match_logits(model, validation, found.texts, (images, texts), None)
        log_odds[images, texts] = logits[:, 1] - logits[:, 0]
        return logits

    rerank(found.itc, found.text_to_image, scored, k)
    return likeliest_itm_weight(to_numpy(found.itc) / model.temperature.item(), log_odds, found.text_to_image)


def _match_logits(
    model: Stage1Model, dataset: CaptionDataset, texts: list[str], pairs: Pairs, scores: str | Path | None
) -> Float[np.ndarray, "pairs 2"]:
    """ITM logits with a progress bar; those that the file `scores` has are not computed again."""
    tokenizer = dataset.tokenizer
    assert isinstance(tokenizer, CaptionTokenizer)
    encoded = tokenizer.encode(texts)
    if scores is None:
        return np.concatenate(list(_parts(model, dataset, encoded, pairs, 0)))
    records: Any = dataset.table.select(dataset.first_records)
    # Of precomputed features the pictures are not read; the store has vouched for them.
    pictures = records_fingerprint(records) if dataset.features is None else json.dumps(records["name"][:])
    key = score_key(fingerprint(model.state_dict()), texts, pictures, pairs)
    file = ScoreFile(scores, key, len(pairs[0]))
    file.append(_parts(model, dataset, encoded, pairs, file.done), file.done)
    return file.read()


def _parts(
    model: Stage1Model, dataset: CaptionDataset, texts: TextBatch, pairs: Pairs, start: int
) -> Iterator[Float[np.ndarray, "part 2"]]:
    view, images = dataset.images(), pairs[0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("re-ranking pairs", total=len(images), completed=start)
        rest = (images[start:], pairs[1][start:])
        for done, logits in match_parts(model, lambda rows: patches_of(model.vision_encoder, view, rows), texts, rest):
            progress.update(task, completed=start + done)
            yield logits.numpy()
