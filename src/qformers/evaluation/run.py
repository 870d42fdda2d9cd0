"""A stage-1 model on captioned pictures: ITC alone, and re-ranked by the ITM head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qformers.convert.run import open_model
from qformers.data.config import SourceConfig
from qformers.data.dataset import CaptionDataset
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import transform_for
from qformers.errors import CheckpointError, DataError
from qformers.evaluation.pictures import PICTURES_AT_ONCE, patch_batches
from qformers.evaluation.retrieval import RerankedSimilarities, rerank_similarities, retrieval_metrics
from qformers.evaluation.scoring import image_features, itc_similarities, match_logits, text_features
from qformers.models.stage1 import Stage1Model


@dataclass(frozen=True)
class RetrievalScores:
    """What a model thinks of every (picture, text) pair of a data set."""

    texts: list[str]
    text_to_image: Int[np.ndarray, " texts"]
    itc: Float[Tensor, "images texts"]
    reranked: RerankedSimilarities | None

    def metrics(self) -> dict[str, float]:
        """`retrieval_metrics` of ITC alone."""
        return retrieval_metrics(self.itc, self.text_to_image)

    def reranked_metrics(self) -> dict[str, float]:
        """`retrieval_metrics` after re-ranking; empty without it."""
        if self.reranked is None:
            return {}
        return retrieval_metrics(self.reranked.i2t, self.text_to_image, self.reranked.t2i)


def evaluate_retrieval(model_path: str, source: SourceConfig, rerank: int = 0) -> dict[str, float]:
    """Recall of the model saved in `model_path` on `source`, every caption and every picture a query.

    With `rerank` = k the k best by ITC are re-ranked by ITM logit + ITC similarity, under `reranked_*` keys.

    Raises:
        CheckpointError: no model there. DataError: as `score_retrieval`.
    """
    loaded = open_model(model_path)
    model = loaded.stage1()
    if loaded.tokenizer is None:
        raise CheckpointError(f"{model_path}: has no tokenizer: put a BERT's files beside the weights")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = CaptionTokenizer.from_pretrained(loaded.tokenizer)
    dataset = CaptionDataset(open_source(source), tokenizer, transform_for(model.vision_encoder), train=False)
    scores = score_retrieval(model, dataset, rerank)
    counts = {"images": float(scores.itc.shape[0]), "texts": float(scores.itc.shape[1])}
    reranked = {f"reranked_{name}": value for name, value in scores.reranked_metrics().items()}
    return counts | scores.metrics() | reranked


def score_retrieval(
    model: Stage1Model, dataset: CaptionDataset, rerank: int = 0, rule: str = "itm+itc"
) -> RetrievalScores:
    """ITC similarities of all pairs of `dataset`, and with `rerank` = k > 0 re-ranked scores of the k best.

    `rule` is one of `retrieval.RERANKING_RULES`.

    Raises:
        DataError: a picture is broken or a caption empty; leaving out a candidate would flatter the figures.
    """
    captions, tokenizer = dataset.captions(), dataset.tokenizer
    assert isinstance(tokenizer, CaptionTokenizer), "retrieval compares texts of the Q-Former's own tokenizer"
    if captions.empty:
        raise DataError(f"{len(captions.empty)} captions are empty, such as that of {captions.empty[0]}: mend them")
    # In bf16, as a feature store keeps them: all of them stay in memory.
    patches = torch.cat([part.bfloat16().cpu() for part in patch_batches(model.vision_encoder, dataset.images())])
    images = image_features(model, _on_device(model, patches))
    similarities = itc_similarities(images, text_features(model, tokenizer.encode, captions.texts))
    reranked = None
    if rerank:
        reranked = rerank_similarities(
            similarities,
            lambda image, text: match_logits(
                model, tokenizer.encode, lambda row: patches[row : row + 1], captions.texts, (image, text)
            )[:, 1],
            k=rerank,
            rule=rule,
            temperature=model.temperature.item(),
        )
    return RetrievalScores(captions.texts, captions.text_to_image, similarities, reranked)


def _on_device(model: Stage1Model, patches: Tensor) -> Iterator[Tensor]:
    for part in patches.split(PICTURES_AT_ONCE):
        yield part.to(model.temperature.device)
