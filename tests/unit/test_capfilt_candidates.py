"""Which captions of a picture are ranked, and which of them are kept."""

from __future__ import annotations

import pytest

from qformers.capfilt.candidates import Account, choose, gather, script_of
from qformers.capfilt.config import OutputConfig, RankingConfig, WorkConfig
from qformers.capfilt.stages import Span
from qformers.capfilt.statistics import busy_fraction, count_accounts
from qformers.errors import ConfigError


def verdicts(candidates) -> list[str]:
    return [candidate.verdict for candidate in candidates]


def test_empty_repeated_and_foreign_captions_are_not_ranked():
    web = ["SVG  Road Signs", " .!", "дорожный знак", "svg road signs!"]
    candidates = gather(web, ["a road sign", "SVG road signs", "", "знак"], "latin")
    assert verdicts(candidates) == [
        "outranked", "empty", "other_script", "duplicate", "outranked", "duplicate", "empty", "outranked",
    ]  # fmt: skip
    assert candidates[0].caption == "SVG Road Signs" and candidates[0].origin == "web"
    assert verdicts(gather(web[2:3], [], "any")) == ["outranked"]
    assert verdicts(gather(web[2:3], [], "cyrillic")) == ["outranked"]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a cat", "latin"),
        ("кот", "cyrillic"),
        ("ねこが好き", "hiragana"),
        ("猫", "cjk"),
        ("قطة", "arabic"),
        ("42", None),
    ],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script
    assert script_of(f"{text} 3 ×") == script


def test_the_best_are_kept_whoever_wrote_them():
    candidates = gather(["web one", "web two"], ["new one", "", "new two"], "latin")
    chosen = choose(candidates, [0.2, 0.5, 0.3, 0.4], None, RankingConfig(keep=2))
    assert verdicts(chosen) == ["outranked", "kept", "outranked", "empty", "kept"]
    account = Account(0, "a.png", "a", "a.png", None, chosen)
    assert [(one.caption, one.origin, one.score) for one in account.kept] == [
        ("web two", "web", 0.5),
        ("new two", "synthetic", 0.4),
    ]
    assert Account.of_json(account.as_json()) == account


def test_equal_scores_keep_the_earlier_and_fewer_than_asked_are_all_kept():
    candidates = gather(["web"], ["new"], "latin")
    assert verdicts(choose(candidates, [0.1, 0.1], None, RankingConfig(keep=1))) == ["kept", "outranked"]
    assert verdicts(choose(candidates, [0.1, 0.1], None, RankingConfig(keep=5))) == ["kept", "kept"]
    assert choose([], [], None, RankingConfig()) == ()


def test_the_judge_and_the_lowest_score_drop_before_the_best_are_chosen():
    candidates = gather(["web"], ["one", "two"], "latin")
    config = RankingConfig(keep=2, min_score=0.2, min_match=0.5)
    chosen = choose(candidates, [0.9, 0.1, 0.3], [0.4, 0.9, 0.6], config)
    assert verdicts(chosen) == ["unmatched", "low_score", "kept"]
    assert [candidate.match for candidate in chosen] == [0.4, 0.9, 0.6]


def test_statistics_count_every_picture_and_caption_once():
    config = RankingConfig(keep=1, min_score=0.0)
    kept = choose(gather(["web"], ["new", "new"], "latin"), [0.5, -1.0], None, config)
    lost = choose(gather(["кот", ""], [], "latin"), [], None, config)
    accounts = [
        Account(0, "a", "a", "a", None, kept),
        Account(1, "b", "b", "b", "not a picture"),
        Account(2, "c", "c", "c", None, lost),
    ]
    found = count_accounts(accounts)
    assert (found.pictures, found.broken, found.without_caption, found.kept) == (3, 1, 1, 1)
    assert found.broken_names == ["b: not a picture"] and found.captioner_busy_fraction is None
    assert {k: n for k, n in found.captions["web"].items() if n} == {"kept": 1, "other_script": 1, "empty": 1}
    assert {k: n for k, n in found.captions["synthetic"].items() if n} == {"low_score": 1, "duplicate": 1}
    assert found.web_survival == 1 / 3
    assert sum(found.scores["synthetic"]["before"]) == found.scores["synthetic"]["before"][0] == 1
    assert sum(found.scores["web"]["after"]) == found.scores["web"]["after"][60] == 1
    assert count_accounts([]).web_survival is None


def test_busy_is_the_share_of_each_captioner_s_own_time():
    one = [Span("one", 0.0, 1.0, 2.0), Span("one", 0.0, 3.0, 4.0)]
    assert busy_fraction(one) == 0.5
    assert busy_fraction([*one, Span("two", 10.0, 10.0, 12.0)]) == pytest.approx(4 / 6)
    assert busy_fraction([*one, Span("one", 100.0, 100.0, 104.0)]) == pytest.approx(6 / 8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RankingConfig(keep=0), "keep is 0"),
        (lambda: RankingConfig(min_match=2.0), "min_match is 2.0"),
        (lambda: WorkConfig(attempts=0), "attempts is 0"),
        (lambda: WorkConfig(devices=[]), "devices is empty"),
        (lambda: OutputConfig("x", shard_pictures=0), "shard_pictures is 0"),
    ],
)
def test_impossible_settings_are_refused_with_their_numbers(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
