"""`Index.open(...).search(...)`: pictures by text, by picture or by both, re-ranked by the ITM head if asked."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lancedb.table import Table

from qformers.errors import ConfigError
from qformers.evaluation.rerank import Rule, pair_scores
from qformers.predictor import Picture, Predictor, load
from qformers.search.table import Approximation, IndexSettings, nearest, open_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One picture found. `similarity` is ITC's; `match` the probability of the ITM head, where it was asked."""

    path: str
    score: float  # what the order goes by: the similarity, or the rule's score after re-ranking
    similarity: float
    match: float | None
    columns: dict[str, Any]  # the rest of the row: size, hash, time, caption and the user's own


class Index:
    """An index and the model that made it."""

    def __init__(self, place: Path, table: Table, settings: IndexSettings, model: Predictor) -> None:
        self.place = place
        self.table = table
        self.settings = settings
        self.model = model

    @classmethod
    def open(cls, place: str | Path, model: str | Path | Predictor | None = None) -> Index:
        """The index at `place`, to search with `model`; by default the one that made it, from where it was then.

        Raises:
            DataError: no index there. CheckpointError: no such model. ConfigError: another model made the index.
        """
        place = Path(place)
        table, settings = open_table(place)
        predictor = model
        if not isinstance(predictor, Predictor):
            predictor = load(predictor or settings.model, "cuda" if torch.cuda.is_available() else "cpu")
        settings.check_model(place, str(predictor.loaded.folder), predictor.fingerprint())
        return cls(place, table, settings, predictor)

    def __len__(self) -> int:
        return self.table.count_rows()

    def picture(self, path: str) -> Path:
        """Where the picture of a hit is."""
        return Path(self.settings.folder) / path

    def search(
        self,
        text: str | None = None,
        image: Picture | None = None,
        k: int = 10,
        *,
        where: str | None = None,
        rerank: int = 0,
        rule: Rule = "itm+itc",
        approximation: Approximation | None = None,
    ) -> list[Hit]:
        """The `k` best pictures, best first; fewer where the index, or what `where` leaves of it, has fewer.

        The similarity to a text is ITC's, the largest over the picture's queries; to a picture the mean over its
        queries of the largest over the other's; to both the mean of the two. Equal ones are in order of their paths.

        Args:
            where: an SQL condition on the columns, such as "year > 2020 and caption like '%cat%'".
            rerank: re-rank so many of the best by the ITM head, by `rule` (`evaluation.rerank`; its cosine is the
                similarity that found them).
            approximation: use the approximate index, if there is one; by default every row is compared.

        Raises:
            ConfigError: neither text nor image, or re-ranking without a text.
            DataError: a text that is empty or longer than the model reads, a wrong `where`, or a picture that cannot
                be read.
        """
        if k < 1 or rerank < 0:
            raise ConfigError(f"k is {k} and rerank {rerank}: needed are k of at least 1 and rerank of at least 0")
        if rerank and text is None:
            raise ConfigError("re-ranking asks how well a text fits, and there is none: give a text, or rerank 0")
        if text is not None:
            self.model.tokenizer.check_length(text)
        size = len(self)
        if max(k, rerank) > size:
            logger.warning("%s: holds %d pictures, fewer than the %d asked for", self.place, size, max(k, rerank))
        vectors = self._query(text, image)
        found = nearest(self.table, vectors, max(1, min(max(k, rerank), size)), where, approximation).to_pylist()
        hits = []
        for row in found:
            similarity = 1.0 - row.pop("_distance") / len(vectors)
            hits.append(Hit(row.pop("path"), similarity, similarity, None, row))
        hits.sort(key=lambda hit: (-hit.score, hit.path))
        if rerank and text is not None and hits:
            hits = self._rerank(hits[:rerank], text, rule) + hits[rerank:]
        return hits[:k]

    def _query(self, text: str | None, image: Picture | None) -> Float[np.ndarray, "vectors embed_dim"]:
        """The query's vectors. Beside a picture the text is repeated: it weighs as much as all of the picture's."""
        parts = []
        if image is not None:
            parts.append(self.model.encode_patches(self.model.patches([image])).features[0])
        if text is not None:
            features = self.model.encode_text(text).features
            parts.append(features if image is None else features.expand(self.settings.num_queries, -1))
        if not parts:
            raise ConfigError("nothing to search for: give a text, an image or both")
        return torch.cat(parts).float().cpu().numpy()

    def _rerank(self, hits: list[Hit], text: str, rule: Rule) -> list[Hit]:
        logits = self.model.match_logits([self.picture(hit.path) for hit in hits], [text] * len(hits))
        similarities = np.array([hit.similarity for hit in hits])
        temperature = self.model.loaded.stage1().temperature.item()
        scores = pair_scores(logits.numpy(), similarities, rule, temperature)
        matches = logits.softmax(dim=-1)[:, 1]
        judged = [
            Hit(hit.path, float(score), hit.similarity, float(match), hit.columns)
            for hit, score, match in zip(hits, scores, matches, strict=True)
        ]
        return sorted(judged, key=lambda hit: (-hit.score, hit.path))


def plain_hit(hit: Hit) -> dict[str, Any]:
    """A hit for JSON, its columns beside the rest."""
    plain = asdict(hit)
    columns = plain.pop("columns")
    del columns["record_sha256"]
    return plain | columns
