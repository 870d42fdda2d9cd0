from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformers.errors import ConfigError, DataError
from qformers.evaluation.retrieval import chance_metrics, rerank_similarities, retrieval_metrics


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
    with pytest.raises(DataError, match="1 of 9 ITC similarities are not finite"):
        rerank_similarities(np.where(np.isnan(similarities), np.inf, similarities), lambda i, t: np.zeros(len(i)))
    with pytest.raises(DataError, match="2 of 9 ITM scores"):
        rerank_similarities(np.eye(3), lambda i, t: np.where((i == 0) & (t > 0), np.inf, 0.0), k=3)


def slow_rerank_order(itc: np.ndarray, itm: np.ndarray, k: int) -> list[list[int]]:
    """Candidates of each row, best first: the shortlist by ITM score, then the others by ITC."""
    orders = []
    for row, score in zip(itc.tolist(), itm.tolist(), strict=True):
        by_itc = sorted(range(len(row)), key=lambda c: -row[c])
        orders.append(sorted(by_itc[:k], key=lambda c: -score[c]) + by_itc[k:])
    return orders


@pytest.mark.parametrize("rule", ["itm", "itm+itc", "itm+itc/temperature"])
@pytest.mark.parametrize(("images", "texts", "k"), [(7, 12, 3), (12, 7, 1), (5, 5, 4), (6, 9, 100), (1, 1, 1)])
def test_reranking_equals_a_slow_reference_and_scores_each_pair_once(images, texts, k, rule):
    rng = np.random.default_rng(images * texts + k)
    itc, itm = rng.standard_normal((2, images, texts)) * np.array([0.3, 8.0])[:, None, None]
    calls = []

    def score_pairs(image_indices, text_indices):
        calls.append(set(zip(image_indices.tolist(), text_indices.tolist(), strict=True)))
        assert len(calls[-1]) == len(image_indices)
        return torch.tensor(itm[image_indices, text_indices])

    reranked = rerank_similarities(itc, score_pairs, k, rule, temperature=0.1)
    final = itm + {"itm": 0, "itm+itc": itc, "itm+itc/temperature": 10 * itc}[rule]
    assert np.argsort(-reranked.i2t, axis=1).tolist() == slow_rerank_order(itc, final, k)
    assert np.argsort(-reranked.t2i.T, axis=1).tolist() == slow_rerank_order(itc.T, final.T, k)
    needed = {(i, t) for i in range(images) for t in np.argsort(-itc[i])[:k].tolist()}
    needed |= {(i, t) for t in range(texts) for i in np.argsort(-itc[:, t])[:k].tolist()}
    assert calls == [needed]
    assert reranked.scored_pairs == len(needed)


def test_reranking_everything_is_brute_force():
    rng = np.random.default_rng(0)
    itc, itm = rng.standard_normal((2, 8, 8))
    reranked = rerank_similarities(itc, lambda i, t: itm[i, t], k=8, rule="itm")
    np.testing.assert_array_equal(reranked.i2t, itm)
    np.testing.assert_array_equal(reranked.t2i, itm)


def test_reranking_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="itm\\+itc"):
        rerank_similarities(np.eye(2), lambda i, t: i, rule="itc")
    with pytest.raises(ConfigError, match="k=0"):
        rerank_similarities(np.eye(2), lambda i, t: i, k=0)
    with pytest.raises(DataError, match="2 pairs"):
        rerank_similarities(np.eye(2), lambda i, t: np.zeros(5), k=1)
