"""The scripts in examples/, each under 60 lines, run at toy size."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from toy_docs import write_checkpoints

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--steps", "3", "--batch_size", "4"]

# name → its arguments, the runs that it starts from, what it leaves, something that it says
CASES = {
    "train_on_a_folder": ([*SMALL, "--preset", "tiny"], {}, "runs/folder/model/config.json", "0."),
    "swap_in_siglip": (
        [*SMALL, "--preset", "tiny"],
        {},
        "runs/siglip/model/config.json",
        "siglip: layer 1, 4 patches of 32",
    ),
    "swap_in_another_language_model": (
        SMALL,
        {"runs/mine": "stage1"},
        "runs/other_language_model/model/language_model/config.json",
        "",
    ),
    "score_pairs": (["--pairs", "held_out"], {"runs/mine": "stage1"}, "scores.csv", "  010"),
    "build_a_search": ([], {"runs/mine": "stage1"}, "runs/index", "and with the text: 00"),
    "question_answering": ([], {"runs/captioner": "stage2"}, "cat.jpg", "what is in the picture?"),
    "convert_a_checkpoint": ([], {}, "runs/exported/config.json", ""),
}


def test_every_example_is_here_and_under_60_lines():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == CASES.keys()
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 60, path.name
        assert f"python examples/{path.name}" in text.splitlines()[0], "its first line says how it is started"


@pytest.mark.parametrize("name", CASES)
def test_example(name, here, monkeypatch, capfd):
    arguments, given, left, said = CASES[name]
    for path, run in given.items():
        shutil.copytree(here / "given" / run, here / path)
    if name == "convert_a_checkpoint":
        write_checkpoints(here)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (here / left).exists()
    out = capfd.readouterr().out
    assert out.strip() and said in out
    if name == "score_pairs":
        scores = [line.split(",") for line in Path("scores.csv").read_text().splitlines()[1:]]
        assert len(scores) == 8 and scores == sorted(scores, key=lambda row: float(row[0]))


def test_formats_that_disagree_end_the_conversion_example(here, monkeypatch):
    write_checkpoints(here)
    script = runpy.run_path(str(EXAMPLES / "convert_a_checkpoint.py"))

    class Other:
        def __init__(self, folder):
            self.folder = folder

        def caption(self, picture, **settings):
            return [str(self.folder)]

    monkeypatch.setattr(script["qformers"], "load", Other)
    with pytest.raises(SystemExit, match="do not say the same"):
        script["main"]()
