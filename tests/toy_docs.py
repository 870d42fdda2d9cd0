"""What the documentation's commands find around them, at toy size: pictures, files, recipes, and models in folders that
are called as on the hub, so that a command is run as it is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from toy_blip2 import save_toy
from toy_capfilt import save_toy_captioner, save_toy_ranker
from toy_language import WORDS, toy_tokenizer, toy_transformers_model
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from qformers.cli import main
from qformers.convert.run import convert

RECIPES = Path(__file__).parents[1] / "recipes"
PICTURES = 50

ENCODERS = ("openai/clip-vit-large-patch14", "facebook/dinov2-base", "facebook/dinov2-small")
TEXT_ENCODERS = ("google-bert/bert-base-uncased", "bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2")
SPEAKERS = {
    "gpt2": ("facebook/opt-125m", "facebook/opt-2.7b"),
    "t5": ("google/flan-t5-base", "google/flan-t5-xl"),
}
RECIPE_SIZE: dict[str, Any] = {
    "data": {"batch_size": 4, "workers": 0, "transform": {"image_px": 28}},
    "model": {"preset": "tiny", "num_queries": 4, "embed_dim": 16},
    "optimiser": {"warmup_steps": 1},
    "steps": 3,
    "log_every_steps": 1,
    "checkpoint_every_steps": 3,
    "precision": "fp32",
}


def write_world(world: Path) -> None:
    """Everything but runs and checkpoints. The current folder must be `world`."""
    _write_pictures(world)
    _write_models()
    (world / "recipes").mkdir()
    for recipe in RECIPES.glob("*.yaml"):
        settings = _merged(yaml.safe_load(recipe.read_text(encoding="utf-8")), RECIPE_SIZE)
        settings.get("language", {}).pop("dtype", None)
        (world / "recipes" / recipe.name).write_text(yaml.safe_dump(settings), encoding="utf-8")


def write_runs() -> None:
    """`given/stage1` and `given/stage2`: runs of the newcomer's two recipes."""
    for arguments in (
        ["recipes/own_data.yaml", "--output", "given/stage1"],
        ["recipes/own_captions.yaml", "--start", "given/stage1", "--output", "given/stage2"],
    ):
        assert main(["train", *arguments]) == 0


def write_checkpoints(world: Path) -> None:
    """BLIP-2's in every format; `runs/stage1` and `runs/stage2` are of its image encoder here."""
    for kind, name in (("opt", "blip2-opt-2.7b"), ("instruct_llama", "instructblip-vicuna-7b")):
        save_toy(kind, world / "Salesforce" / name)
    save_toy("retrieval", world / "made" / "retrieval")
    convert(world / "Salesforce" / "blip2-opt-2.7b", world / "runs" / "stage2", "qformers")
    convert(world / "made" / "retrieval", world / "runs" / "stage1", "qformers")
    convert(world / "runs" / "stage1", world / "made" / "whole.pth", "lavis")
    state = torch.load(world / "made" / "whole.pth", weights_only=True)["model"]
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("visual_encoder.")}
    torch.save({"model": kept}, world / "blip2_pretrained.pth")


def _write_pictures(world: Path) -> None:
    draw = np.random.default_rng(0)

    def picture(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(path)
        return path.name

    def caption() -> str:
        return " ".join(draw.choice(WORDS, 6))

    for folder, first, count in (("pictures", 1, PICTURES), ("held_out", 101, 8)):
        rows = [(picture(world / folder / f"{number:04d}.jpg"), caption()) for number in range(first, first + count)]
        with (world / folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
    for name in ("cat.jpg", "dog.jpg", "cat.png", "dog.png"):
        picture(world / name)
    names = [f"{number:04d}.jpg" for number in range(1, 13)]
    for file, prefix in (("pairs.jsonl", ""), ("test.jsonl", ""), ("web.jsonl", "pictures/")):
        _write_lines(world / file, [{"image": prefix + name, "caption": caption()} for name in names])
    with (world / "about.csv").open("w", newline="") as file:
        rows = [(name, 2000 + 3 * place, "in the garden") for place, name in enumerate(names)]
        csv.writer(file).writerows([("path", "year", "caption"), *rows])

    vg = world / "data" / "visual_genome"
    _write_lines(
        vg.with_suffix(".jsonl"), [{"image": picture(vg / f"{n}.jpg"), "caption": caption()} for n in range(4)]
    )
    images = [
        {"filename": name, "split": split, "cocoid": place, "sentences": [{"raw": caption()} for _ in range(5)]}
        for place, (name, split) in enumerate(zip(names, ["train"] * 6 + ["val"] * 3 + ["test"] * 3, strict=True))
    ]
    for file, folder in (("dataset_coco.json", "coco"), ("data/coco/dataset_coco.json", "data/coco/images")):
        for name in names:
            picture(world / folder / name)
        (world / file).write_text(json.dumps({"images": images}))


def _write_models() -> None:
    for name in ENCODERS:
        save_toy_ranker("clip", Path(name))
    save_toy_ranker("siglip", Path("google/siglip-base-patch16-224"))
    save_toy_captioner("blip", Path("Salesforce/blip-image-captioning-large"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    Path("made").mkdir()
    Path("made/words.txt").write_text("\n".join(words) + "\n")
    for name in TEXT_ENCODERS:
        BertTokenizer("made/words.txt").save_pretrained(name)
        # Of the `tiny` preset's shape.
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        BertForMaskedLM(BertConfig(vocab_size=len(words), **shape)).save_pretrained(name)
    for family, names in SPEAKERS.items():
        for name in names:
            toy_transformers_model(family, seed=4).save_pretrained(name)
            toy_tokenizer(Path(name), ends=family == "t5")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _merged(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = {
        key: _merged(settings.get(key, {}), value) if isinstance(value, dict) else value for key, value in over.items()
    }
    return {**settings, **merged}
