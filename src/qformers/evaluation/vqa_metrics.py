"""The official VQA accuracy, and exact match, without a model.

Behaves as VQAEval of the VQA authors' evaluation code (github.com/GT-Vision-Lab/VQA, vqaEvaluation/vqaEval.py) does,
its quirks included; `tests/golden/make_vqa_golden.py` has the values it gave. Fractions here, per cent there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Metric = Literal["vqa", "exact"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the authors hand re.UNICODE, which is 32, to `sub` as its count
_DIGIT_COMMA = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
# Written whole, as the authors list them: each is found by leaving out one apostrophe, or all.
_WHOLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWICE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
# What follows no rule. Their keys that hold capitals are never met, since answers are in lower case by then.
_IRREGULAR = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "twas": "'twas",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    found = {whole.replace("'", ""): whole for whole in _WHOLE.split()}
    for whole in _TWICE.split():
        head, middle, tail = whole.split("'")
        found |= {f"{head}{middle}'{tail}": whole, f"{head}'{middle}{tail}": whole}
    return found | _IRREGULAR


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Punctuation to nothing where it stands beside a space, and everywhere in a text like "1,000"; else to a space.

    Periods that no digit follows are removed, the first 32 of them.
    """
    found = text
    removes_all = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or removes_all else " ")
    return _PERIOD.sub("", found, count=_PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """Lower case; number words to digits, articles left out, apostrophes put back into contractions."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_answer(text: str) -> str:
    """An answer as it is compared: line breaks and tabs to spaces, punctuation, then words."""
    return normalise_words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The official accuracy of one answer, 0 to 1: the mean, leaving out each person in turn, of min(1, matches / 3).

    As in the official code people's answers lose their punctuation only where they are not all the same, and are
    compared in their own spelling otherwise.
    """
    said = normalise_answer(answer)
    if len(set(people)) > 1:
        people = [strip_punctuation(text) for text in people]
    matches = np.array([text == said for text in people])
    return float(np.minimum(1.0, (matches.sum() - matches) / 3).mean())


def exact_match(answer: str, people: Sequence[str]) -> float:
    """1 if the answer, normalised, is one of the given ones, normalised too; else 0. For GQA and for sets with one
    answer a question, where leaving one out leaves none."""
    return float(normalise_answer(answer) in {normalise_answer(text) for text in people})


def fitting_metric(answers: Sequence[Sequence[str]]) -> Metric:
    """The official accuracy where every question has ten answers, as it was made for; else exact match."""
    return "vqa" if answers and all(len(given) == 10 for given in answers) else "exact"


def score_answers(
    said: Sequence[str], people: Sequence[Sequence[str]], types: Mapping[str, Sequence[str]], metric: Metric
) -> dict[str, float]:
    """`accuracy` over all, and `<kind>/<type>` over the questions of each type, 0 to 1.

    Args:
        types: of each kind, such as `answer_type`, that of every question; a question without one counts as "unknown"
            where others have one.
    """
    score = vqa_accuracy if metric == "vqa" else exact_match
    scores = np.array([score(answer, given) for answer, given in zip(said, people, strict=True)])
    metrics = {"accuracy": float(scores.mean())}
    for kind, of_question in types.items():
        if not any(of_question):
            continue
        named = np.array([name or "unknown" for name in of_question])
        metrics |= {f"{kind}/{name}": float(scores[named == name].mean()) for name in sorted(set(named))}
    return metrics
