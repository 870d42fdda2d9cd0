"""What a run did to the captions, counted from its accounts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from qformers.capfilt.candidates import Account, Origin, Verdict
from qformers.capfilt.stages import Span

BINS = 80  # of the histograms, over cosines from −1 to 1
ORIGINS: tuple[Origin, ...] = get_args(Origin)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Statistics:
    """Pictures and captions by what became of them.

    `captions` counts captions by origin and verdict; `scores` are histograms of the scores by origin, of all that were
    ranked ("before") and of those kept ("after"), over BINS bins from −1 to 1. `captioner_busy_fraction` is the share
    of their time that the captioners of the last call that had any left worked, `seconds` how long that call took.
    """

    pictures: int
    broken: int
    without_caption: int
    broken_names: list[str]
    captions: dict[Origin, dict[Verdict, int]]
    scores: dict[Origin, dict[str, list[int]]]
    captioner_busy_fraction: float | None = None
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        """Captions kept."""
        return sum(counts["kept"] for counts in self.captions.values())

    @property
    def web_survival(self) -> float | None:
        """Share of the web captions that were kept; None where the source has none."""
        given = sum(self.captions["web"].values())
        return self.captions["web"]["kept"] / given if given else None

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"kept": self.kept, "web_survival": self.web_survival}


def count_accounts(accounts: Iterable[Account], busy: float | None = None, seconds: float = 0.0) -> Statistics:
    """Statistics of all accounts, with what is known of the time."""
    pictures = broken = without = 0
    names: list[str] = []
    captions: dict[Origin, dict[Verdict, int]] = {origin: dict.fromkeys(VERDICTS, 0) for origin in ORIGINS}
    scores: dict[Origin, dict[str, list[int]]] = {
        origin: {part: [0] * BINS for part in ("before", "after")} for origin in ORIGINS
    }
    for account in accounts:
        pictures += 1
        if account.broken is not None:
            broken += 1
            names.append(f"{account.name}: {account.broken}")
            continue
        without += not account.kept
        for candidate in account.candidates:
            captions[candidate.origin][candidate.verdict] += 1
            if candidate.score is not None:
                place = min(max(int((candidate.score + 1) / 2 * BINS), 0), BINS - 1)
                scores[candidate.origin]["before"][place] += 1
                scores[candidate.origin]["after"][place] += candidate.verdict == "kept"
    return Statistics(
        pictures,
        broken,
        without,
        names,
        captions,
        scores,
        busy,
        seconds,
    )


def busy_fraction(spans: Sequence[Span]) -> float | None:
    """Share of the time from a captioner's first moment to its last that it worked, over all of them."""
    if not spans:
        return None
    there = 0.0
    for worker in {span.worker for span in spans}:
        own = [span for span in spans if span.worker == worker]
        # One process may have been ready more than once: each attempt starts anew.
        for ready in {span.ready for span in own}:
            there += max(span.end for span in own if span.ready == ready) - ready
    return sum(span.end - span.start for span in spans) / there
