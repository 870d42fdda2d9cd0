"""The demo, whole and small, on its real pictures and models."""

from __future__ import annotations

import json

import pytest

from qformers.cli import main

RECALLS = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]


@pytest.mark.assets
def test_quick_demo_reports_every_method_on_held_out_pictures_and_can_be_run_again(tmp_path):
    arguments = ["demo", "--quick", "--vqa", "--output", str(tmp_path / "demo")]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["concepts"]["candidates"] == 248
    for kind in ("concepts", "scenes", "scenes_finetuned"):
        for method in ("qformer", "qformer_reranked", "ridge", "chance"):
            assert all(0 <= metrics[kind][method][recall] <= 1 for recall in RECALLS)
        assert metrics[kind]["ridge"]["mean_recall"] > 3 * metrics[kind]["chance"]["mean_recall"]
    captions = metrics["captions"]
    assert {"cider", "bleu4", "rouge_l", "object_recall", "shuffled"} <= captions.keys()
    assert captions["shuffled"].keys() == captions.keys() - {"shuffled"}
    questions = metrics["vqa"]
    assert questions.keys() == {"qformer", "unconditioned", "question_only", "majority"}
    for method in questions.values():
        assert all(0 <= method[key] <= 1 for key in ("accuracy", "answer_type/yes/no", "answer_type/shape"))
    trained = [questions[arm]["trained_parameters"] for arm in ("qformer", "unconditioned", "question_only")]
    assert trained[0] == trained[1] == trained[2] > 10_000_000
    assert 0.2 < questions["majority"]["accuracy"] < 0.6
    report = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "ridge regression" in report and "GPL-2.0" in report
    assert "http-equiv" not in report and "<script" not in report

    weights = (tmp_path / "demo" / "run" / "model" / "model.safetensors").read_bytes()
    assert main(arguments) == 0  # finished phases are found, nothing is trained again
    assert (tmp_path / "demo" / "run" / "model" / "model.safetensors").read_bytes() == weights
