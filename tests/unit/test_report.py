from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from qformers.demo.plots import draw_loss, draw_recalls
from qformers.demo.report import (
    AnswerExample,
    Answering,
    AttentionExample,
    CaptionExample,
    Captions,
    DemoResults,
    Evaluation,
    ImageQuery,
    Source,
    TextQuery,
    Training,
    write_report,
)
from qformers.errors import DataError
from qformers.evaluation.attention import attention_overlay
from qformers.report.figures import THEMES, picture_uri

METRICS = {f"{direction}_r{k}": k / 20 for direction in ("i2t", "t2i") for k in (1, 5, 10)}
SCORES = {"cider": 0.1, "bleu4": 0.02, "rouge_l": 0.3, "object_recall": 0.25, "all_objects": 0.05}
PICTURE = Image.new("RGB", (40, 30), "orange")


def results() -> DemoResults:
    shots = [PICTURE] * 3
    evaluation = Evaluation(
        title="Held-out concepts",
        held_out="Concepts that training never saw.",
        images=248,
        texts=248,
        itm_weight=0.25,
        methods={
            "Q-Former": {**METRICS, "t2i_r1": 0.4321, "t2i_median_rank": 2.0},
            "ridge regression": {**METRICS, "t2i_median_rank": 7.5},
        },
        text_queries=[
            TextQuery("a <b>found</b> cat", shots, [True, False, False], 1, PICTURE),
            TextQuery("a lost dog", shots, [False] * 3, 17, PICTURE),
        ],
        image_queries=[
            ImageQuery(PICTURE, ["yes", "no", "no"], [True, False, False], 1, "yes"),
            ImageQuery(PICTURE, ["no", "also right", "no"], [False, True, False], 2, "also right"),
            ImageQuery(PICTURE, ["no", "nor this", "nor that"], [False] * 3, 31, "the right words"),
        ],
    )
    return DemoResults(
        training=Training("DINOv2", "MiniLM", 1234567, 16, ["ITC", "ITM"], 9000, 30000, 200, 64, 75.0, "2 cores"),
        loss_rows=[{"step": step, "loss/itc": 5 / step, "loss/itm": 0.7} for step in range(1, 41)]
        + [{"step": 40, "validation/itc": 0.3}],
        evaluations=[evaluation],
        attention=[AttentionExample(PICTURE, "a held-out cat", [3, 5], np.eye(4)[None].repeat(2, axis=0))],
        seconds={"train": 75.0, "evaluate": 5.0},
        settings={"optimiser.learning_rate": 1e-4, "prompt": "<script>alert(1)</script>"},
        rerun=["make demo"],
        sources=[Source("emoji", "1.0", "MIT", "https://example.org/emoji", "pictures")],
        captioning_loss_rows=[{"step": step, "loss/lm": 6 / step} for step in range(1, 9)],
        captions=Captions(
            2,
            {"model": {**SCORES, "cider": 1.234}, "control": SCORES},
            [
                CaptionExample(PICTURE, "a <i>cat</i> on a car", "a cat above a car", {"cat": True, "car": True}),
                CaptionExample(PICTURE, "a dog", "a dog below a tree", {"dog": True, "tree": False}),
            ],
        ),
        answering=Answering(
            9673,
            ["colour", "yes/no"],
            {
                "reads the question": {
                    "accuracy": 0.9434,
                    "answer_type/colour": 0.8771,
                    "answer_type/yes/no": 0.9876,
                    "trained_parameters": 31660992,
                },
                "always “no”": {
                    "accuracy": 0.3691,
                    "answer_type/colour": 0.0,
                    "answer_type/yes/no": 0.5012,
                    "trained_parameters": 0,
                },
            },
            [
                AnswerExample(PICTURE, "what <u>colour</u> is it?", "red", "red"),
                AnswerExample(PICTURE, "is there a circle?", "yes", "no"),
            ],
            400,
            17.6,
        ),
        skipped={"stamps": "apt-get is missing"},
        notes=["One seed."],
    )


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every tag is closed."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "srcset", "href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_questions_are_shown_by_type_with_right_and_wrong_answers(tmp_path):
    html = write_report(tmp_path, results()).read_text(encoding="utf-8")
    shown = text_of(html)
    assert "9,673 questions" in shown and "400 steps ( 18 minutes" in shown.replace("(", "( ")
    assert "reads the question 0.943 0.877 0.988 31,660,992" in shown
    assert "always “no” 0.369 0.000 0.501 0" in shown
    right, wrong = shown[shown.index("Right answers") :].split("Wrong answers")
    assert "what &lt;u&gt;colour&lt;/u&gt; is it? “red”" in right and "true:" not in right
    assert "is there a circle? “yes” true: no" in wrong
    without = write_report(tmp_path, replace(results(), answering=None)).read_text(encoding="utf-8")
    assert "<h2>Questions</h2>" in html and "<h2>Questions</h2>" not in without


def test_the_report_is_whole_and_loads_nothing_from_elsewhere(tmp_path):
    path = write_report(tmp_path / "runs", results())
    assert path == tmp_path / "runs" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert not {"script", "link", "a", "iframe"} & set(page.tags)
    assert len(page.loaded) > 20
    for address in page.loaded:
        kind, content = re.fullmatch(r"data:image/(webp|svg\+xml);base64,(.*)", address).groups()
        decoded = base64.b64decode(content, validate=True)
        if kind == "webp":
            assert decoded[8:12] == b"WEBP"
        else:
            assert ElementTree.fromstring(decoded).tag.endswith("svg")


def test_words_of_the_data_are_escaped_and_figures_are_shown_as_measured(tmp_path):
    html = write_report(tmp_path, results()).read_text(encoding="utf-8")
    assert "<script>" not in html and "<b>found</b>" not in html and "<i>cat</i>" not in html
    words = text_of(html)
    for shown in (
        "9,000 pictures in 1 min 15 s",
        "1,234,567 parameters",
        "Concepts that training never saw. 248 pictures and 248 texts",
        "Q-Former 0.432 0.250 0.500 2 0.050 0.250 0.500 –",
        "ridge regression 0.050 0.250 0.500 7.5",
        "standard error of about 0.031",  # sqrt(0.4321 × 0.5679 / 248)
        "place 17",
        "the right words ✓",
        "query 3",
        "together 1 min 20 s",
        "optimiser.learning_rate 0.0001",
        "emoji 1.0 pictures MIT example.org/emoji",
        "stamps : apt-get is missing",
        "make demo",
        "model 1.234 0.020 0.300 0.250 0.050 control 0.100",
        "Scenes where an object is missing",
        "true: a dog below a tree",
        "One seed.",
    ):
        assert shown in words, shown
    assert "place 1 " not in words and 'value="2"' not in html  # only answers outside the list are added to it


def test_the_same_results_give_the_same_file_and_a_short_run_has_a_report_too(tmp_path):
    first = write_report(tmp_path / "a", results()).read_bytes()
    assert write_report(tmp_path / "b", results()).read_bytes() == first
    bare = replace(
        results(),
        loss_rows=[{"step": 1, "loss/itc": 2.0}],
        evaluations=[],
        attention=[],
        captions=None,
        skipped={},
        notes=[],
    )
    words = text_of(write_report(tmp_path / "a", bare).read_text(encoding="utf-8"))
    assert "Nothing was skipped." in words and "Where the queries look" not in words and "Captions of" not in words


def test_incomplete_results_are_refused_by_name(tmp_path):
    whole = results()
    (evaluation,) = whole.evaluations
    broken = replace(evaluation, methods={"ridge": {"t2i_r1": 0.3}})
    with pytest.raises(DataError, match="'ridge' of 'Held-out concepts' lacks t2i_r5"):
        write_report(tmp_path, replace(whole, evaluations=[broken]))
    with pytest.raises(DataError, match="no methods"):
        write_report(tmp_path, replace(whole, evaluations=[replace(evaluation, methods={})]))
    with pytest.raises(DataError, match="2 maps for 1 queries"):
        write_report(tmp_path, replace(whole, attention=[replace(whole.attention[0], queries=[3])]))
    assert not (tmp_path / "report.html").exists()


def test_bars_are_as_high_as_the_recalls_and_curves_go_through_the_losses():
    axes = draw_recalls({"a": METRICS, "b": {**METRICS, "t2i_r1": 0.9}}, "t2i", THEMES["light"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.05, 0.25, 0.5, 0.9, 0.25, 0.5])
    axes = draw_loss(results().loss_rows, "itc", THEMES["dark"]).axes[0]
    logged, mean, validation = axes.lines
    np.testing.assert_allclose(logged.get_ydata(), 5 / np.arange(1, 41))
    np.testing.assert_allclose(mean.get_ydata()[0], (5 + 2.5) / 2)  # window of 40 / 20 = 2
    assert mean.get_xdata()[0] == 2
    assert validation.get_xydata().tolist() == [[40.0, 0.3]]


def test_an_overlay_reddens_the_patch_that_is_looked_at():
    attention = np.zeros((2, 2))
    attention[0, 1] = 0.004
    overlay = np.asarray(attention_overlay(Image.new("RGB", (20, 20), "grey"), attention)).astype(int)
    redness = overlay[..., 0] - overlay[..., 2]
    assert (redness[:10, 10:] > 100).all()
    assert (redness[10:] == 0).all() and (redness[:, :10] == 0).all()
    assert attention_overlay(PICTURE, np.zeros((3, 3))).size == PICTURE.size


def test_thumbnails_are_small_and_leave_the_picture_alone():
    large = Image.new("RGBA", (900, 300))
    assert len(picture_uri(large, 100)) < 2000
    assert large.size == (900, 300)
