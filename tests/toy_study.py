"""What the study reads, at toy size: random pictures, a tiny random encoder, language model and vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import write_toy_data

from qformers.study.inputs import Inputs
from qformers.study.run import run_study

THINGS = ["red", "green", "blue", "white", "dark"]


def toy_inputs(folder: Path) -> Inputs:
    """Data sets in the layout of the demo's and of easy-VQA's, and the models."""
    folder.mkdir()
    write_toy_data(folder)
    toy_transformers_model("gpt2").save_pretrained(folder / "gpt2")
    toy_tokenizer(folder / "gpt2")
    draw = np.random.default_rng(0)
    for name, kinds in {
        "train": ["concept"] * 16 + ["scene"] * 24,
        "held_out_concepts": ["concept"] * 8,
        "held_out_scenes": ["scene"] * 8,
        "validation_scenes": ["scene"] * 4,
    }.items():
        rows = [_record(folder, f"{name}-{number}", kind, draw) for number, kind in enumerate(kinds)]
        _write(folder / f"{name}.jsonl", rows)
    questions = folder / "questions"
    questions.mkdir()
    for part, count in (("train", 20), ("validation", 5)):
        rows = [
            {
                "image": str(folder / f"{number % 16}.png"),
                "image_id": f"{part}-{number}",
                "question": question,
                "question_id": f"{part}-{number}-{question}",
                "answers": [["cat", "dog"][number % 2]],
                "answer_type": "shape",
            }
            for number in range(count)
            for question in ("red cat", "the tree")
        ]
        _write(questions / f"{part}.jsonl", rows)
    return Inputs(folder / "encoder", folder / "text", folder / "gpt2", folder / "gpt2", folder, questions)


def _record(folder: Path, name: str, kind: str, draw: np.random.Generator) -> dict:
    pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    first, second = draw.choice(THINGS, 2, replace=False)
    return {
        "image": f"{name}.png",
        "captions": [f"a {first} square of {second} line", f"the {second} line"],
        "image_id": name,
        "group": name,
        "together": name,
        "kind": kind,
        "objects": [{"name": str(first)}, {"name": str(second)}] if kind == "scene" else [],
    }


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def study_some(inputs: Inputs, output: Path) -> dict:
    """Questions 1 and 3 with one seed: four runs."""
    return run_study(output, "tiny", [1, 3], seeds=1, inputs=inputs)
