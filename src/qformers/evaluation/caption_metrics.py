"""Caption scores without Java: BLEU, ROUGE-L and CIDEr, the numbers of pycocoevalcap to rounding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qformers.errors import DataError
from qformers.evaluation.caption_tokens import tokenize

Tokens = Sequence[str]
Ngram = tuple[str, ...]

ORDERS = (1, 2, 3, 4)
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
# pycocoevalcap adds these to BLEU's counts so that nothing is divided by zero; scores near zero show them.
_TINY, _SMALL = 1e-15, 1e-9


def caption_metrics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of one caption a picture against that picture's reference captions, all pictures as one set.

    | key | what | range |
    |---|---|---|
    | `bleu1` … `bleu4` | BLEU over the whole set, the reference closest in length counting for brevity | 0–1 |
    | `rouge_l` | ROUGE-L, β = 1.2, mean over pictures | 0–1 |
    | `cider` | what everybody publishes as CIDEr, times 100 (BLIP-2's 145.8 is 1.458 here) | 0–10 |
    | `cider_plain` | CIDEr as its paper defines it (arXiv 1411.5726, section 4), without stemming | 0–10 |

    `cider` equals pycocoevalcap's "CIDEr", which is in truth the paper's CIDEr-D: counts of the candidate clipped
    to the reference's, and a Gaussian penalty (σ = 6) on the difference in length. Both take document frequencies
    from the references given here, so a score belongs to its set: of one picture alone it is 0.

    Raises:
        DataError: no candidates, another number of reference lists, a picture without references.
    """
    check_references(candidates, references)
    return token_metrics(
        [tokenize(text) for text in candidates], [[tokenize(t) for t in texts] for texts in references]
    )


def token_metrics(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """`caption_metrics` of captions already cut into tokens.

    Raises:
        DataError: as `caption_metrics`.
    """
    check_references(candidates, references)
    return {
        **_bleu(candidates, references),
        "rouge_l": float(np.mean([_rouge_l(*pair) for pair in zip(candidates, references, strict=True)])),
        **_cider(candidates, references),
    }


def by_domain(
    candidates: Sequence[str], references: Sequence[Sequence[str]], domains: Sequence[str]
) -> dict[str, dict[str, float]]:
    """`caption_metrics` of each domain's pictures as a set of its own, and "overall" of all.

    NoCaps is reported so: each domain has its own annotation file, hence its own document frequencies, and the
    overall CIDEr is no mean of the others.

    Raises:
        DataError: as `caption_metrics`; not one domain for each candidate, or a domain named "overall".
    """
    check_references(candidates, references)
    if len(domains) != len(candidates):
        raise DataError(f"{len(candidates)} candidates and {len(domains)} domains: each picture needs exactly one")
    if "overall" in domains:
        raise DataError('a domain is named "overall", the name of all pictures together: rename it')
    tokens = [tokenize(text) for text in candidates]
    reference_tokens = [[tokenize(text) for text in texts] for texts in references]
    scores = {}
    for domain in sorted(set(domains)):
        rows = [row for row, of in enumerate(domains) if of == domain]
        scores[domain] = token_metrics([tokens[row] for row in rows], [reference_tokens[row] for row in rows])
    scores["overall"] = token_metrics(tokens, reference_tokens)
    return scores


def check_references(candidates: Sequence[object], references: Sequence[object]) -> None:
    """Raise DataError unless there is a candidate and each has a list of at least one reference."""
    if len(candidates) != len(references):
        raise DataError(
            f"{len(candidates)} candidates and {len(references)} lists of references: each picture needs one of both"
        )
    if not candidates:
        raise DataError("no candidates: there is nothing to score")
    for row, texts in enumerate(references):
        if isinstance(texts, str):
            raise DataError(f"the references of candidate {row} are one string: give a list of captions")
        if not texts:
            raise DataError(f"candidate {row} has no references: leave its picture out, or give at least one caption")


def _words(tokens: Tokens) -> list[str]:
    """Tokens as pycocoevalcap's BLEU and CIDEr see them: the no-break space in "3 1/2" parts them again."""
    return " ".join(tokens).split()


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    correct, guessed = np.zeros(len(ORDERS)), np.zeros(len(ORDERS))
    candidate_words = reference_words = 0
    for candidate, texts in zip(candidates, references, strict=True):
        words, others = _words(candidate), [_words(text) for text in texts]
        most: Counter[Ngram] = Counter()
        for other in others:
            most |= _ngrams(other)
        for ngram, count in _ngrams(words).items():
            correct[len(ngram) - 1] += min(count, most[ngram])
        guessed += [max(0, len(words) - n + 1) for n in ORDERS]
        candidate_words += len(words)
        # The closest length; of two as close, the shorter.
        reference_words += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    precisions = np.cumprod((correct + _TINY) / (guessed + _SMALL))
    ratio = (candidate_words + _TINY) / (reference_words + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return {f"bleu{n}": float(precisions[n - 1] ** (1 / n) * brevity) for n in ORDERS}


def _rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """Best precision and best recall, each over its own choice of reference, then their weighted mean."""
    candidate = candidate or [""]  # an empty caption counts as one empty token, there as here
    texts = [text or [""] for text in references]
    common = [_longest_common_subsequence(candidate, text) for text in texts]
    precision = max(common) / len(candidate)
    recall = max(length / len(text) for length, text in zip(common, texts, strict=True))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    """Its length, by rows of bits instead of a table: bit i of `row` is off where token i of `a` adds one."""
    places: dict[str, int] = {}
    for place, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = (1 << len(a)) - 1
    row = everywhere
    for token in b:
        hits = row & places.get(token, 0)
        row = (row + hits | row - hits) & everywhere
    return len(a) - row.bit_count()


class _Weighed(NamedTuple):
    """A caption as CIDEr compares it: each n-gram's count times its rarity, and their length for each n."""

    weights: dict[Ngram, float]
    norms: Float[np.ndarray, " orders"]
    bigrams: int  # pycocoevalcap's measure of a caption's length


def _weigh(ngrams: Counter[Ngram], rarity: Mapping[Ngram, float], unseen: float) -> _Weighed:
    weights, squares, bigrams = {}, [0.0] * len(ORDERS), 0
    for ngram, count in ngrams.items():
        weight = count * rarity.get(ngram, unseen)
        weights[ngram] = weight
        squares[len(ngram) - 1] += weight * weight
        bigrams += count if len(ngram) == 2 else 0
    return _Weighed(weights, np.sqrt(squares), bigrams)


def _similarity(candidate: _Weighed, reference: _Weighed) -> tuple[float, float]:
    """Cosine of the two, mean over n: with counts clipped and length punished, and plain."""
    clipped, plain = np.zeros(len(ORDERS)), np.zeros(len(ORDERS))
    for ngram, weight in candidate.weights.items():
        other = reference.weights.get(ngram)
        if other is not None:
            clipped[len(ngram) - 1] += min(weight, other) * other
            plain[len(ngram) - 1] += weight * other
    norms = candidate.norms * reference.norms
    norms[norms == 0] = 1  # nothing there, or nothing rare: the sums above are 0 as well
    penalty = math.exp(-((candidate.bigrams - reference.bigrams) ** 2) / (2 * CIDER_SIGMA**2))
    return float(np.mean(clipped / norms)) * penalty, float(np.mean(plain / norms))


def _cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    reference_ngrams = [[_ngrams(_words(text)) for text in texts] for texts in references]
    pictures_with = Counter(ngram for texts in reference_ngrams for ngram in set(chain.from_iterable(texts)))
    rarity = {ngram: math.log(len(candidates) / pictures) for ngram, pictures in pictures_with.items()}
    unseen = math.log(len(candidates))  # an n-gram of no reference weighs as one of a single picture
    scores = np.zeros((len(candidates), 2))
    for row, (candidate, texts) in enumerate(zip(candidates, reference_ngrams, strict=True)):
        weighed = _weigh(_ngrams(_words(candidate)), rarity, unseen)
        scores[row] = np.mean([_similarity(weighed, _weigh(text, rarity, unseen)) for text in texts], axis=0)
    clipped, plain = 10 * scores.mean(axis=0)
    return {"cider": float(clipped), "cider_plain": float(plain)}
