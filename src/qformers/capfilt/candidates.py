"""A picture's captions, written and found: put together, judged, and the best of them kept."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qformers.capfilt.config import RankingConfig
from qformers.data.text import clean_caption

Origin = Literal["web", "synthetic"]
Verdict = Literal["kept", "outranked", "unmatched", "low_score", "other_script", "empty", "duplicate"]
RANKED: tuple[Verdict, ...] = ("kept", "outranked", "unmatched", "low_score")
DIGITS = 4  # of a score: beyond is rounding, which changes with the batch


@dataclass(frozen=True)
class Candidate:
    """One caption of a picture. `score` is the ranker's and `match` the judge's probability, where they were asked."""

    caption: str
    origin: Origin
    verdict: Verdict
    score: float | None = None
    match: float | None = None


@dataclass(frozen=True)
class Account:
    """What became of a picture and of each of its captions; one line of a shard's account."""

    place: int
    name: str
    image_id: str
    path: str
    broken: str | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def kept(self) -> list[Candidate]:
        """The captions to train on, best first."""
        chosen = [candidate for candidate in self.candidates if candidate.verdict == "kept"]
        return sorted(chosen, key=lambda candidate: -(candidate.score or 0.0))

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def of_json(cls, row: dict[str, Any]) -> Account:
        """What `as_json` gave."""
        return cls(**{**row, "candidates": tuple(Candidate(**candidate) for candidate in row["candidates"])})


def gather(web: Sequence[str], synthetic: Sequence[str], script: str) -> list[Candidate]:
    """All captions of a picture; those to be ranked are "outranked" until `choose` says better.

    A caption is a duplicate of an earlier one when both are alike after `clean_caption`; the web's come first.
    """
    seen: set[str] = set()
    candidates = []
    found: list[tuple[str, Origin]] = [*((text, "web") for text in web), *((text, "synthetic") for text in synthetic)]
    for text, origin in found:
        caption, cleaned = " ".join(text.split()), clean_caption(text)
        verdict: Verdict = "outranked"
        if not cleaned:
            verdict = "empty"
        elif cleaned in seen:
            verdict = "duplicate"
        elif origin == "web" and script != "any" and script_of(cleaned) not in (script, None):
            verdict = "other_script"
        seen.add(cleaned)
        candidates.append(Candidate(caption, origin, verdict))
    return candidates


def script_of(text: str) -> str | None:
    """The script of most of a text's letters, as the first word of their Unicode names ("latin"); None: no letters."""
    names = Counter(unicodedata.name(letter, "unknown").split()[0] for letter in text if letter.isalpha())
    return names.most_common(1)[0][0].lower() if names else None


def choose(
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    matches: Sequence[float] | None,
    config: RankingConfig,
) -> tuple[Candidate, ...]:
    """The captions with their scores and verdicts: the `keep` best of those that pass are kept.

    Args:
        scores, matches: of the candidates whose verdict is "outranked", in order. Of equal scores the earlier wins.
    """
    rated: list[Candidate] = []
    values = iter(zip(scores, matches if matches is not None else [None] * len(scores), strict=True))
    for candidate in candidates:
        if candidate.verdict != "outranked":
            rated.append(candidate)
            continue
        score, match = next(values)
        score = round(score, DIGITS)
        verdict: Verdict = "outranked"
        if match is not None and match < config.min_match:
            verdict = "unmatched"
        elif config.min_score is not None and score < config.min_score:
            verdict = "low_score"
        match = None if match is None else round(match, DIGITS)
        rated.append(replace(candidate, verdict=verdict, score=score, match=match))
    passing = [place for place, candidate in enumerate(rated) if candidate.verdict == "outranked"]
    passing.sort(key=lambda place: -(rated[place].score or 0.0))
    for place in passing[: config.keep]:
        rated[place] = replace(rated[place], verdict="kept")
    return tuple(rated)
