from __future__ import annotations

import gzip
import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qformers.data.archives import coco_rows
from qformers.errors import DataError
from qformers.evaluation.caption_metrics import by_domain, caption_metrics, token_metrics
from qformers.evaluation.caption_sources import read_domains
from qformers.evaluation.caption_tokens import tokenize
from qformers.evaluation.java_metrics import java_metrics

GOLDEN = json.loads(gzip.decompress((Path(__file__).parents[1] / "golden" / "captions.json.gz").read_bytes()))
KEYS = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider", "cider_plain"]

# Every caption known to be cut otherwise than by pycocoevalcap, and why.
DIFFERENCES = {
    "it is plan B.": "it is plan b.",  # theirs, "b", because the next caption there begins with "A"
    "see fig.": "see fig",  # theirs, "fig.", because the next begins with a number
    "a caf&eacute; table": "a caf &eacute; table",  # HTML's letters inside a word
    "see 😀example.com": "see example.com",  # an emoji stuck to an address is part of it there
    "မြန်မာ sign": "မြန်မာ sign",  # that tokenizer knows Unicode as of 2012: it drops some scripts' vowel signs
}


def split(text: str) -> list[str]:
    return text.split(" ") if text else []


def test_tokens_equal_those_of_pycocoevalcap():
    pairs = list(zip(GOLDEN["captions"], GOLDEN["tokens"], strict=True))
    assert len(pairs) == 5000
    differ = [(caption, theirs, tokenize(caption)) for caption, theirs in pairs if tokenize(caption) != split(theirs)]
    listed = "\n".join(f"{caption!r}: {split(theirs)}, ours {ours}" for caption, theirs, ours in differ)
    assert len(differ) <= 0.001 * len(pairs), listed


def test_the_captions_known_to_differ_are_these():
    ours = {caption: " ".join(tokenize(caption)) for caption, theirs in GOLDEN["differing"]}
    theirs = dict(GOLDEN["differing"])
    assert {caption: text for caption, text in ours.items() if text != theirs[caption]} == DIFFERENCES


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A woman's dog (a pug) can't jump.", "a woman 's dog -lrb- a pug -rrb- ca n't jump"),
        ("", ""),
        ("?!", "?!"),
        ("... -- , ' \"", ""),
        ("keycap: *", "keycap *"),
        ("twelve o’clock", "twelve o’clock"),
        ("it’s 5 p.m.\nat St. Paul", "it 's 5 p.m. at st. paul"),
        ("❤️ and ½ £", "❤ and 1/2 #"),
        ("a well\xadknown sign", "a wellknown sign"),
    ],
)
def test_tokens_of_single_captions(caption, tokens):
    assert tokenize(caption) == split(tokens)


@pytest.mark.parametrize("case", GOLDEN["sets"], ids=lambda case: case["name"])
def test_scores_equal_those_of_pycocoevalcap(case):
    references = [[split(text) for text in texts] for texts in case["references"]]
    scores = token_metrics([split(text) for text in case["candidates"]], references)
    assert list(scores) == KEYS
    assert {key: scores[key] for key in case["scores"]} == pytest.approx(case["scores"], abs=1e-6, rel=0)


def paper_cider(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """Equations 1 to 3 of arXiv 1411.5726, with dense vectors over all n-grams, times 10."""

    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return list(zip(*(words[i:] for i in range(n)), strict=False))

    scores = np.zeros((4, len(candidates)))
    for n in range(1, 5):
        everything = {gram for texts in [*references, candidates] for text in texts for gram in grams(text, n)}
        vocabulary = {gram: place for place, gram in enumerate(sorted(everything))}
        pictures = Counter(gram for texts in references for gram in {g for text in texts for g in grams(text, n)})
        idf = np.array([math.log(len(references) / max(1, pictures[gram])) for gram in vocabulary])

        def vector(words: list[str], n=n, vocabulary=vocabulary, idf=idf) -> np.ndarray:
            counts = np.zeros(len(vocabulary))
            for gram in grams(words, n):
                counts[vocabulary[gram]] += 1
            weighed = counts / max(1, counts.sum()) * idf
            return weighed / (np.linalg.norm(weighed) or 1.0)

        for row, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
            scores[n - 1, row] = np.mean([vector(candidate) @ vector(text) for text in texts])
    return 10 * float(scores.mean())


def test_plain_cider_is_that_of_the_paper():
    case = GOLDEN["sets"][0]
    candidates = [text.split() for text in case["candidates"][:40]]
    references = [[text.split() for text in texts] for texts in case["references"][:40]]
    scores = token_metrics(candidates, references)
    assert scores["cider_plain"] == pytest.approx(paper_cider(candidates, references), abs=1e-9)
    assert scores["cider_plain"] > scores["cider"]  # no clipping, no penalty


def test_repeating_a_rare_word_helps_plain_cider_only():
    references = [["a red kite", "a kite in the sky"], ["a dog"], ["a cat"]]
    once = caption_metrics(["a kite", "a dog", "a cat"], references)
    often = caption_metrics(["kite kite kite kite", "a dog", "a cat"], references)
    assert often["cider"] < once["cider"]
    assert often["cider_plain"] - often["cider"] > once["cider_plain"] - once["cider"]


def test_a_hand_worked_example():
    scores = caption_metrics(["The dog sat."], [["the dog sat down", "a cat"]])
    shorter = math.exp(1 - 4 / 3)  # 3 words against 4: the reference of 2 is as far and shorter, so it counts
    assert scores["bleu1"] == pytest.approx(1.0)
    assert scores["bleu2"] == pytest.approx(1.0)
    assert caption_metrics(["The dog sat."], [["the dog sat down"]])["bleu1"] == pytest.approx(shorter)
    assert scores["rouge_l"] == pytest.approx((1 + 1.44) * 0.75 / (0.75 + 1.44))
    assert scores["cider"] == 0.0  # one picture: nothing is rare


def test_the_order_of_the_pictures_does_not_matter():
    candidates = ["a dog on a bench", "two cats", "", "a bus"]
    references = [["a dog sits on a bench", "dog"], ["two cats play"], ["a train"], ["the bus", "a red bus", "a bus"]]
    order = [2, 0, 3, 1]
    there = caption_metrics([candidates[i] for i in order], [references[i] for i in order])
    assert there == pytest.approx(caption_metrics(candidates, references), abs=1e-12)


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        (["a dog"], [], "1 candidates and 0 lists of references"),
        ([], [], "no candidates"),
        (["a dog", "a cat"], [["a dog"], []], "candidate 1 has no references"),
        (["a dog"], ["a dog"], "the references of candidate 0 are one string"),
    ],
)
@pytest.mark.parametrize(
    "scorer", [caption_metrics, java_metrics, lambda c, r: by_domain(c, r, ["in-domain"] * len(c))]
)
def test_what_cannot_be_scored_is_said(scorer, candidates, references, message):
    with pytest.raises(DataError, match=message):
        scorer(candidates, references)


def test_each_domain_is_a_set_of_its_own():
    candidates = ["a dog on a bench", "two cats", "a red bus", "a kite"]
    references = [["a dog sits on a bench"], ["two cats play", "cats"], ["the red bus"], ["a kite in the sky"]]
    scores = by_domain(candidates, references, ["near-domain", "in-domain", "near-domain", "in-domain"])
    assert list(scores) == ["in-domain", "near-domain", "overall"]
    assert scores["in-domain"] == caption_metrics([candidates[1], candidates[3]], [references[1], references[3]])
    assert scores["overall"] == caption_metrics(candidates, references)
    assert scores["overall"]["cider"] > (scores["in-domain"]["cider"] + scores["near-domain"]["cider"]) / 2


def test_domains_are_one_for_each_picture_and_none_is_named_overall():
    with pytest.raises(DataError, match="2 candidates and 1 domains"):
        by_domain(["a", "b"], [["a"], ["b"]], ["in-domain"])
    with pytest.raises(DataError, match="overall"):
        by_domain(["a"], [["a"]], ["overall"])


def test_nocaps_is_read_as_coco_captions_with_domains(tmp_path):
    path = tmp_path / "nocaps.json"
    images = [
        {"id": 0, "file_name": "a.jpg", "coco_url": "https://example.org/a.jpg", "domain": "near-domain"},
        {"id": 7, "file_name": "b.jpg", "coco_url": "https://example.org/b.jpg", "domain": "out-domain"},
    ]
    annotations = [{"image_id": 7, "caption": "a kite"}, {"image_id": 0, "caption": "a dog"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    domains = read_domains(path)
    assert domains == {"0": "near-domain", "7": "out-domain"}
    rows = list(coco_rows([str(path)], None, ""))
    assert [(domains[row["image_id"]], row["captions"]) for row in rows] == [
        ("near-domain", ["a dog"]),
        ("out-domain", ["a kite"]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no images"),
        ('{"images": []}', "no images"),
        ('{"images": [{"id": 1, "domain": "in-domain"}, {"id": 2}]}', "image 1 has no domain"),
        ('{"images": [{"domain": "in-domain"}]}', "image 0 has no id"),
    ],
)
def test_a_file_without_domains_is_named(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"captions.json: .*{message}"):
        read_domains(path)
    with pytest.raises(DataError, match=r"other\.json: cannot be read: No such file"):
        read_domains(tmp_path / "other.json")


PAIRS = (["A dog!", "a cat"], [["the dog", "a pug"], ["a cat"]])


def test_without_java_or_pycocoevalcap_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_metrics(*PAIRS)["meteor"].reason == "not computed: no Java"
    install_java(monkeypatch, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert java_metrics(*PAIRS)["spice"].reason == "not computed: pycocoevalcap is not installed"


def install_java(monkeypatch, folder: Path) -> None:
    (folder / "java").write_text("#!/bin/sh\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def install_scorer(monkeypatch, folder: Path, name: str, body: str) -> None:
    """A package in pycocoevalcap's place whose scorer does `body`."""
    module = folder / "pycocoevalcap" / name
    module.mkdir(parents=True, exist_ok=True)
    for init in (module / "__init__.py", module.parent / "__init__.py"):
        init.touch()
    lines = [f"class {name.capitalize()}:", "    def compute_score(self, gts, res):", f"        {body}"]
    (module / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_scores_and_failures_of_the_scorers_come_back(monkeypatch, tmp_path):
    install_java(monkeypatch, tmp_path)
    given = "{0: ['the dog', 'a pug'], 1: ['a cat']}, {0: ['a dog'], 1: ['a cat']}"
    install_scorer(monkeypatch, tmp_path, "meteor", f"print('noise'); return 0.25 * ((gts, res) == ({given})), []")
    install_scorer(monkeypatch, tmp_path, "spice", "raise OSError('no models\\nmore')")
    scores = java_metrics(*PAIRS)
    assert (scores["meteor"].value, scores["meteor"].reason) == (0.25, None)
    assert (scores["spice"].value, scores["spice"].reason) == (None, "not computed: no models")


def test_a_scorer_that_dies_or_never_ends_is_no_error(monkeypatch, tmp_path):
    install_java(monkeypatch, tmp_path)
    install_scorer(monkeypatch, tmp_path, "meteor", "import os; os._exit(3)")
    install_scorer(monkeypatch, tmp_path, "spice", "import time; time.sleep(60)")
    assert java_metrics(*PAIRS, metrics=["meteor"])["meteor"].reason == "not computed: its process ended with code 3"
    slow = java_metrics(*PAIRS, metrics=["spice"], timeout_seconds=0.3)["spice"]
    assert slow.reason == "not computed: no answer within 0.3 s"
