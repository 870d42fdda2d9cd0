from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformers.data.dataset import CaptionDataset
from qformers.errors import ConfigError, DataError
from qformers.evaluation import run
from qformers.evaluation.rerank import check_rule, likeliest_itm_weight, pair_scores, rerank, shortlist
from qformers.evaluation.retrieval import chance_metrics, metrics_of_ranks, retrieval_metrics
from qformers.models.stage1 import Stage1Model


def slow_metrics(i2t: list[list[float]], t2i: list[list[float]], owners: list[int]) -> dict[str, float]:
    """Sorting candidates one query at a time, wrong ones first among equals."""
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for image in sorted(set(owners)):
        order = sorted(range(len(owners)), key=lambda t: (-i2t[image][t], owners[t] == image))
        ranks["i2t"].append(1 + next(place for place, t in enumerate(order) if owners[t] == image))
    for text, owner in enumerate(owners):
        order = sorted(range(len(t2i)), key=lambda i: (-t2i[i][text], i == owner))
        ranks["t2i"].append(1 + order.index(owner))
    metrics = {f"{d}_r{k}": sum(r <= k for r in ranks[d]) / len(ranks[d]) for d in ranks for k in (1, 5, 10)}
    metrics["mean_recall"] = sum(metrics.values()) / 6
    for direction, values in ranks.items():
        metrics[f"{direction}_median_rank"] = float(np.median(values))
    return metrics


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 14), st.integers(0, 2**31), st.booleans())
def test_metrics_equal_a_slow_reference_with_many_captions_and_ties(images, texts, seed, ties):
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, images, size=texts)
    scores = rng.standard_normal((2, images, texts))
    if ties:
        scores = scores.round()
    expected = slow_metrics(scores[0].tolist(), scores[1].tolist(), owners.tolist())
    assert retrieval_metrics(scores[0], owners, scores[1]) == pytest.approx(expected)
    assert retrieval_metrics(torch.tensor(scores[0]), torch.tensor(owners), torch.tensor(scores[1])) == (
        pytest.approx(expected)
    )


def test_a_hand_worked_example():
    similarities = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.7]])
    metrics = retrieval_metrics(similarities, np.array([0, 0, 1]))
    assert metrics["i2t_r1"] == 0.5  # image 1 prefers text 0
    assert metrics["t2i_r1"] == pytest.approx(2 / 3)  # text 1 prefers image 1
    assert metrics["i2t_median_rank"] == 1.5
    assert metrics["t2i_median_rank"] == 1.0


def test_a_constant_score_earns_nothing():
    metrics = retrieval_metrics(np.zeros((20, 20)), np.arange(20))
    assert metrics["mean_recall"] == 0.0
    assert metrics["i2t_median_rank"] == metrics["t2i_median_rank"] == 20


def test_chance_is_the_average_over_random_scores():
    rng = np.random.default_rng(0)
    owners = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 6, 5, 5])
    runs = [retrieval_metrics(rng.standard_normal((8, 12)), owners) for _ in range(3000)]
    chance = chance_metrics(8, owners)
    assert chance == pytest.approx({name: np.mean([run[name] for run in runs]) for name in chance}, abs=0.02)


def test_half_precision_similarities_are_read():
    metrics = retrieval_metrics(torch.eye(4, dtype=torch.bfloat16), torch.arange(4))
    assert metrics["mean_recall"] == 1.0


@pytest.mark.parametrize("owners", [[0, 2], [-1, 0]])
def test_an_unknown_image_is_refused(owners):
    with pytest.raises(DataError, match="rows 0 to 1"):
        retrieval_metrics(np.eye(2), np.array(owners))


def test_nan_is_refused_with_its_count():
    similarities = np.eye(3)
    similarities[0, 1] = np.nan
    with pytest.raises(DataError, match=r"1 of 9 .* NaN"):
        retrieval_metrics(similarities, np.arange(3))
    own = np.arange(3)
    with pytest.raises(DataError, match="1 of 9 ITC similarities are not finite"):
        rerank(np.where(np.isnan(similarities), np.inf, similarities), own, no_opinion)
    with pytest.raises(DataError, match="2 of 9 ITM scores"):
        rerank(np.eye(3), own, lambda i, t: np.where((i == 0) & (t > 0), np.inf, 0.0)[:, None] * [1, 1], k=3)


def no_opinion(images, texts):
    return np.zeros((len(images), 2))


def expected_scores(logits: np.ndarray, itc: np.ndarray, rule: str) -> np.ndarray:
    return {
        "itm": logits[..., 1],
        "itm+itc": logits[..., 1] + itc,
        "itm+itc/temperature": 0.5 * (logits[..., 1] - logits[..., 0]) + itc / 0.25,
    }[rule]


def slow_order(itc: list[float], scores: list[float], k: int) -> tuple[list[int], list[float]]:
    """One query's candidates, the shortlist by score then the others by ITC, and a score that orders them so."""
    by_itc = sorted(range(len(itc)), key=lambda c: -itc[c])
    order = sorted(by_itc[:k], key=lambda c: -scores[c]) + by_itc[k:]
    return order, [scores[c] + 1000.0 if c in by_itc[:k] else itc[c] for c in range(len(itc))]


@pytest.mark.parametrize("rule", ["itm", "itm+itc", "itm+itc/temperature"])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 14), st.integers(1, 15), st.integers(0, 2**31), st.booleans())
def test_reranking_equals_a_slow_reference_and_scores_each_pair_once(rule, images, texts, k, seed, ties):
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, images, size=texts)
    itc, logits = rng.standard_normal((images, texts)), rng.standard_normal((images, texts, 2))
    if ties:
        itc, logits = itc.round(), logits.round()
    calls = []

    def score_pairs(image_indices, text_indices):
        calls.append(list(zip(image_indices.tolist(), text_indices.tolist(), strict=True)))
        return torch.tensor(logits[image_indices, text_indices])

    found = rerank(itc, owners, score_pairs, k, rule, temperature=0.25, itm_weight=0.5)
    scores = expected_scores(logits, itc, rule)
    rows = [slow_order(itc[i].tolist(), scores[i].tolist(), k) for i in range(images)]
    columns = [slow_order(itc[:, t].tolist(), scores[:, t].tolist(), k) for t in range(texts)]
    assert found.i2t.candidates.tolist() == [order[:k] for order, _ in rows]
    assert found.t2i.candidates.tolist() == [order[:k] for order, _ in columns]
    as_similarities = np.array([ordered for _, ordered in rows]), np.array([ordered for _, ordered in columns]).T
    expected = slow_metrics(as_similarities[0].tolist(), as_similarities[1].tolist(), owners.tolist())
    assert metrics_of_ranks(found.i2t.ranks, found.t2i.ranks) == pytest.approx(expected)
    needed = {(i, t) for i in range(images) for t in rows[i][0][:k]} | {
        (i, t) for t in range(texts) for i in columns[t][0][:k]
    }
    assert calls == [sorted(needed)]
    assert found.scored_pairs == len(needed)


@pytest.mark.parametrize("rule", ["itm", "itm+itc", "itm+itc/temperature"])
def test_reranking_everything_is_brute_force(rule):
    """Ragged captions: image 3 has none, image 0 three."""
    rng = np.random.default_rng(0)
    owners = np.array([0, 1, 0, 2, 4, 4, 0, 5])
    itc, logits = rng.standard_normal((6, 8)).astype(np.float32), rng.standard_normal((6, 8, 2)).astype(np.float32)
    found = rerank(itc, owners, lambda i, t: logits[i, t], k=8, rule=rule, temperature=0.25, itm_weight=0.5)
    scores = expected_scores(logits.astype(np.float64), itc.astype(np.float64), rule)
    assert metrics_of_ranks(found.i2t.ranks, found.t2i.ranks) == retrieval_metrics(scores, owners)
    np.testing.assert_array_equal(found.i2t.candidates, np.argsort(-scores, axis=1))
    np.testing.assert_array_equal(found.t2i.candidates, np.argsort(-scores, axis=0).T)


def test_the_shortlist_is_torchs_topk():
    similarities = torch.randn(300, 70)  # more rows than are sorted at once
    assert shortlist(similarities.numpy(), 9).tolist() == similarities.topk(9).indices.tolist()
    assert shortlist(np.zeros((2, 5)), 3).tolist() == [[0, 1, 2]] * 2


def test_reranking_refuses_what_it_cannot_do():
    own = np.arange(2)
    with pytest.raises(ConfigError, match="itm\\+itc"):
        check_rule("itc")
    with pytest.raises(ConfigError, match="temperature"):
        pair_scores(np.zeros((1, 2)), np.zeros(1), "itm+itc/temperature", None)
    with pytest.raises(ConfigError, match="k=0"):
        rerank(np.eye(2), own, no_opinion, k=0)
    with pytest.raises(DataError, match=r"2 pairs .* \(5,\)"):
        rerank(np.eye(2), own, lambda i, t: np.zeros(5), k=1)


@pytest.mark.parametrize("use", [0.0, 0.5, 1.5])
def test_the_likeliest_itm_weight_is_that_of_the_likelihood_ratio(use):
    """Both heads see unit noise, on right pairs a bump of 1 and of `use`: by Neyman and Pearson the best score is
    1 · ITC + `use` · ITM. 0.15 is three standard errors at 800 queries."""
    rng = np.random.default_rng(0)
    own = np.arange(400)
    itc, log_odds = (rng.standard_normal((400, 400)) + bump * np.eye(400) for bump in (1, use))
    assert likeliest_itm_weight(3 * itc, 3 * log_odds, own) == pytest.approx(use, abs=0.15)
    log_odds[rng.random((400, 400)) < 0.5] = -np.inf  # ITM scores a shortlist
    assert likeliest_itm_weight(itc, log_odds, own) == pytest.approx(use, abs=0.2)
    np.fill_diagonal(log_odds, -np.inf)
    assert likeliest_itm_weight(itc, log_odds, own) == 0  # no right pair was scored: nothing speaks for ITM


@pytest.mark.parametrize("opinion", [1.0, -1.0])
def test_itm_weighs_what_validation_speaks_for(opinion, monkeypatch):
    """ITC puts each picture's text behind the next one's: an ITM that is right mends it, one that is wrong does not."""
    own, scored = np.arange(6), []
    itc = torch.tensor(np.roll(np.eye(6), 1, axis=1) * 0.9 + np.eye(6) * 0.6)

    def match_logits(model, dataset, texts, pairs, scores):
        scored.append(len(pairs[0]))
        return np.stack([np.zeros(len(pairs[0])), 2 * opinion * (pairs[0] == pairs[1])], axis=1)

    monkeypatch.setattr(run, "score_retrieval", lambda *_: run.RetrievalScores(["text"] * 6, own, itc, None, None))
    monkeypatch.setattr(run, "_match_logits", match_logits)
    model = Mock(spec=Stage1Model, temperature=torch.tensor(0.1))
    weight = run.best_itm_weight(model, Mock(spec=CaptionDataset), k=3)
    assert weight > 1.5 if opinion > 0 else weight == 0  # of 3 apart by ITC, 2 by ITM
    assert len(scored) == 1, "each pair is scored once for all weights"
