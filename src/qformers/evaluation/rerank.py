"""Re-ranking of ITC's best candidates by the ITM head (BLIP-2, section 4.4), independent of any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.errors import ConfigError, DataError
from qformers.evaluation.retrieval import checked, checked_owners, image_ranks, text_ranks, to_numpy

Rule = Literal["itm", "itm+itc", "itm+itc/temperature"]
ScorePairs = Callable[[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]], "np.ndarray | Tensor"]
ROWS_AT_ONCE = 256
LARGEST_ITM_WEIGHT = 4.0


@dataclass(frozen=True)
class Ranking:
    """One direction, re-ranked.

    `candidates[q]` are the `k` candidates of query `q` that ITC found, best first by the rule. `ranks` has the rank
    of the best right candidate among all, shortlisted or not, as `retrieval_metrics` counts: from images to texts
    only for images that have a text.
    """

    candidates: Int[np.ndarray, "queries k"]
    ranks: Int[np.ndarray, " asked"]


@dataclass(frozen=True)
class Reranked:
    """Both directions, and how many pairs the ITM head scored for them."""

    i2t: Ranking
    t2i: Ranking
    scored_pairs: int


def rerank(
    similarities: Float[np.ndarray | Tensor, "images texts"],
    text_to_image: Int[np.ndarray | Tensor, " texts"],
    score_pairs: ScorePairs,
    k: int = 128,
    rule: Rule = "itm+itc",
    temperature: float | None = None,
    itm_weight: float = 1.0,
) -> Reranked:
    """Re-rank the `k` best candidates of every image and of every text.

    Candidates outside a shortlist keep their ITC order below it. Equal ITC similarities enter a shortlist by lowest
    index, equal scores keep ITC's order; a rank counts equals before the right one, as `retrieval_metrics` does.

    Args:
        similarities: cosines, max over queries (ITC). Beside them, memory is needed for the shortlists only.
        score_pairs: `(image_indices, text_indices)` → ITM logits, pairs x 2. Called once, with the union of both
            directions' shortlists sorted by image, so that no pair is scored twice.
        k: the paper: 128.
        rule, itm_weight: see `pair_scores`.

    Raises:
        ConfigError: an unknown rule, or k below 1.
        DataError: logits or similarities that are not finite, or of another shape than the pairs.
    """
    if k < 1:
        raise ConfigError(f"re-ranking needs at least 1 candidate, got k={k}")
    check_rule(rule, temperature)
    itc = checked(similarities, "ITC")
    owners = checked_owners(text_to_image, itc.shape)
    if not np.isfinite(itc).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(itc))} of {itc.size} ITC similarities are not finite")
    texts_of_image, images_of_text = shortlist(itc, k), shortlist(itc.T, k)
    all_images, all_texts = np.arange(itc.shape[0])[:, None], np.arange(itc.shape[1])[:, None]
    # A pair is one number, image x texts + text: sorted, they are in order of images.
    i2t_pairs, t2i_pairs = all_images * itc.shape[1] + texts_of_image, images_of_text * itc.shape[1] + all_texts
    pairs = np.unique(np.concatenate([i2t_pairs.ravel(), t2i_pairs.ravel()]))
    image_indices, text_indices = np.divmod(pairs, itc.shape[1])
    logits = to_numpy(score_pairs(image_indices, text_indices))
    if logits.shape != (pairs.size, 2):
        raise DataError(f"{pairs.size} pairs were given to the ITM head, logits of shape {logits.shape} came back")
    if not np.isfinite(logits).all():
        unusable = np.count_nonzero(~np.isfinite(logits).all(axis=1))
        raise DataError(f"{unusable} of {pairs.size} ITM scores are not finite: the ranking would mean nothing")
    scores = pair_scores(logits, itc[image_indices, text_indices], rule, temperature, itm_weight)
    i2t_scores, t2i_scores = (scores[np.searchsorted(pairs, own)] for own in (i2t_pairs, t2i_pairs))
    captioned = np.unique(owners)
    return Reranked(
        i2t=Ranking(
            _by_score(texts_of_image, i2t_scores),
            _ranks(
                i2t_scores[captioned],
                owners[texts_of_image[captioned]] == captioned[:, None],
                image_ranks(itc, owners),
            ),
        ),
        t2i=Ranking(
            _by_score(images_of_text, t2i_scores),
            _ranks(t2i_scores, images_of_text == owners[:, None], text_ranks(itc, owners)),
        ),
        scored_pairs=int(pairs.size),
    )


def pair_scores(
    logits: Float[np.ndarray, "pairs 2"],
    cosines: Float[np.ndarray, " pairs"],
    rule: Rule,
    temperature: float | None,
    itm_weight: float = 1.0,
) -> Float[np.ndarray, " pairs"]:
    """What pairs are ranked by, in float64.

    "itm": the match logit, the paper's ITM score. "itm+itc": match logit + cosine, as the authors' code.
    "itm+itc/temperature": `itm_weight` · log-odds of a match + cosine / temperature, both logits then: where ITM is the
    weaker head, as after a short run, it does not drown ITC. `evaluation.run.best_itm_weight` finds the weight.
    """
    check_rule(rule, temperature)
    logits, cosines = logits.astype(np.float64), cosines.astype(np.float64)
    if rule == "itm":
        return logits[:, 1]
    if rule == "itm+itc":
        return logits[:, 1] + cosines
    assert temperature is not None, "check_rule"
    return itm_weight * (logits[:, 1] - logits[:, 0]) + cosines / temperature


def likeliest_itm_weight(
    itc: Float[np.ndarray, "images texts"],
    log_odds: Float[np.ndarray, "images texts"],
    text_to_image: Int[np.ndarray, " texts"],
) -> float:
    """The weight w (0–4) of the conditional logit softmax(s · itc + s · w · log_odds) that is likeliest.

    The softmax is over the candidates of a query that ITM has scored; queries of both directions count. It asks how
    sure each query's right candidate is, where R@1 asks only whether it comes first, so some hundred queries are enough
    to tell whether ITM adds anything. 0 says that it does not.

    Args:
        itc: cosine / temperature.
        log_odds: of a match by ITM; -inf for pairs that it has not scored. Queries whose right candidates are all
            among those say nothing; where all are, the weight is 0.
    """
    scored = torch.from_numpy(np.isfinite(log_odds))
    right = torch.from_numpy(text_to_image == np.arange(len(itc))[:, None]) & scored
    if not right.any():
        return 0.0
    heads = torch.stack([torch.from_numpy(itc), torch.from_numpy(log_odds).where(scored, 0)])
    scales = torch.tensor([1.0, 0.0], dtype=heads.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([scales], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        scores = torch.tensordot(scales, heads, dims=1).where(scored, -torch.inf)
        shares = torch.cat([_log_share(scores, right), _log_share(scores.T, right.T)])
        # The penalty keeps the scales finite where the right candidates are ahead of all others already.
        value = 1e-4 * scales.square().sum() - shares.mean()
        value.backward()
        return value

    optimiser.step(loss)
    of_itc, of_itm = scales.tolist()
    return min(max(of_itm, 0.0) / max(of_itc, 1e-9), LARGEST_ITM_WEIGHT)


def _log_share(
    scores: Float[Tensor, "queries candidates"], right: Bool[Tensor, "queries candidates"]
) -> Float[Tensor, " known"]:
    """The log of the softmax's share that a query's right candidates have, for queries with one."""
    known = right.any(dim=1)
    scores, right = scores[known], right[known]
    return scores.where(right, -torch.inf).logsumexp(dim=1) - scores.logsumexp(dim=1)


def check_rule(rule: str, temperature: float | None = 1.0) -> None:
    """Raise ConfigError unless `rule` is one of `Rule`, and has the temperature that it needs."""
    if rule not in get_args(Rule):
        raise ConfigError(f"re-ranking rule {rule!r} is unknown: use one of {', '.join(get_args(Rule))}")
    if rule == "itm+itc/temperature" and not temperature:
        raise ConfigError(f"re-ranking rule {rule!r} needs the model's temperature, got {temperature}")


def shortlist(similarities: Float[np.ndarray, "queries candidates"], k: int) -> Int[np.ndarray, "queries k"]:
    """The `k` best candidates of each query (all, if there are fewer), best first, equals by lowest index."""
    parts = [
        np.argsort(-similarities[start : start + ROWS_AT_ONCE], axis=1, kind="stable")[:, :k]
        for start in range(0, len(similarities), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _by_score(candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.take_along_axis(candidates, np.argsort(-scores, axis=1, kind="stable"), axis=1)


def _ranks(scores: np.ndarray, right: np.ndarray, itc_ranks: np.ndarray) -> np.ndarray:
    """Rank of the best right candidate of each query, `scores` and `right` being of its shortlist.

    Where the shortlist holds no right one, nothing that was re-ranked came to stand before or after it: its rank is
    ITC's, since every shortlisted candidate has at least its similarity.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    ahead = ((scores >= best) & ~right).sum(axis=1)
    return np.where(right.any(axis=1), 1 + ahead, itc_ranks)
