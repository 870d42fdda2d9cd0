"""The report of a run: how many captions survive, their scores, pictures with kept and dropped ones side by side."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from qformers.capfilt.candidates import Account, Candidate, Origin, Verdict
from qformers.capfilt.pictures import Pictures
from qformers.capfilt.statistics import BINS, Statistics
from qformers.report.figures import Theme, new_figure, picture_uri, themed
from qformers.report.page import write_page

SHOWN = 12  # pictures of each kind
ORIGIN_NAMES: dict[Origin, str] = {"web": "web captions", "synthetic": "synthetic captions"}
VERDICT_NAMES: dict[Verdict, str] = {
    "kept": "kept",
    "outranked": "outranked by better ones",
    "unmatched": "called unmatched by the judge",
    "low_score": "below the lowest score",
    "other_script": "in another script",
    "empty": "empty",
    "duplicate": "said before of the same picture",
}


@dataclass(frozen=True)
class Example:
    """A picture with its captions, best first."""

    uri: str
    name: str
    kept: list[Candidate]
    dropped: list[Candidate]


def write_capfilt_report(
    folder: Path,
    statistics: Statistics,
    settings: Mapping[str, Any],
    accounts: Iterable[Account],
    pictures: Pictures,
) -> Path:
    """Write `report.html` into `folder`; it needs nothing beside itself."""
    lost, others = _chosen(accounts, statistics.pictures)
    return write_page(
        folder,
        "qformers.capfilt",
        {"percent": _percent, "verdict": lambda verdict: VERDICT_NAMES[verdict]},
        statistics=statistics,
        settings=settings,
        origins=ORIGIN_NAMES,
        verdicts=VERDICT_NAMES,
        figures=[
            {
                "alt": f"Scores of the {name}, of all that were ranked and of those kept",
                "uris": themed(draw_scores, statistics.scores[origin], name),
            }
            for origin, name in ORIGIN_NAMES.items()
        ],
        lost=_examples(lost, pictures),
        others=_examples(others, pictures),
    )


def draw_scores(histograms: Mapping[str, list[int]], name: str, theme: Theme) -> Figure:
    """How many captions have which score: all that were ranked, and in front of them those kept."""
    figure, axes = new_figure(theme, width=5.2, height=3.0)
    edges = np.linspace(-1, 1, BINS + 1)
    for part, colour, label in (("before", theme.methods[3], "ranked"), ("after", theme.methods[0], "kept")):
        axes.bar(edges[:-1], histograms[part], np.diff(edges), align="edge", color=colour, label=label)
    used = np.flatnonzero(histograms["before"])
    if used.size:
        axes.set_xlim(float(edges[used[0]]) - 0.05, float(edges[used[-1] + 1]) + 0.05)
    axes.set_title(f"Scores of the {name}", loc="left", fontsize=10, color=theme.text)
    axes.set_xlabel("score of the ranker", fontsize=8.5, color=theme.text)
    axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=theme.text)
    return figure


def _chosen(accounts: Iterable[Account], pictures: int) -> tuple[list[Account], list[Account]]:
    """Pictures that lost a web caption by the most, and of the others some, evenly spread over the run."""
    lost: list[tuple[float, int, Account]] = []
    others: list[Account] = []
    for account in accounts:
        by = _lost_by(account)
        if by is not None:
            heapq.heappush(lost, (by, -account.place, account))
            lost = heapq.nlargest(SHOWN, lost) if len(lost) > 2 * SHOWN else lost
        elif account.broken is None and account.place * SHOWN >= len(others) * pictures:
            others.append(account)
    return [account for *_, account in heapq.nlargest(SHOWN, lost)], others


def _lost_by(account: Account) -> float | None:
    """By how much the best kept caption scores more than the best web caption that was dropped; None: none was."""
    dropped = [one.score for one in account.candidates if one.origin == "web" and one.verdict != "kept"]
    scored = [score for score in dropped if score is not None]
    kept = account.kept
    if not scored or not kept or kept[0].score is None:
        return None
    return kept[0].score - max(scored)


def _examples(accounts: Iterable[Account], pictures: Pictures) -> list[Example]:
    examples = []
    for account in accounts:
        _, image = pictures.read(account.place)
        if isinstance(image, Image.Image):  # gone since it was captioned: it is left out of the page, not of the counts
            dropped = [one for one in account.candidates if one.verdict != "kept"]
            dropped.sort(key=lambda one: (one.origin != "web", -(one.score if one.score is not None else -2.0)))
            examples.append(Example(picture_uri(image, 190), account.name, account.kept, dropped))
    return examples


def _percent(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "–"
