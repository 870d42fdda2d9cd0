"""A whole training run that takes seconds: random pictures, a tiny random encoder, a tiny vocabulary."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, Dinov2Config, Dinov2Model

from qformers.data.config import SourceConfig, TransformConfig
from qformers.models.config import ModelConfig
from qformers.training.config import DataConfig, OptimiserConfig, TrainConfig

WORDS = ["a", "the", "picture", "of", "red", "green", "blue", "white", "dark", "square", "circle", "line"]


def write_toy_data(folder: Path, pictures: int = 16) -> None:
    """`pairs.jsonl` with its pictures, `encoder` (DINOv2) and `text` (a BERT tokenizer)."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(pictures):
        pixels = draw.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": " ".join(draw.choice(WORDS, 6))})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    shape = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, mlp_ratio=2)
    Dinov2Model(shape).save_pretrained(folder / "encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "text")


def write_tars(folder: Path, pictures: int = 16, shards: int = 4) -> None:
    """WebDataset tars `pairs-0.tar`, …, of as many pictures each, with two captions to choose from."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for shard, numbers in enumerate(np.split(np.arange(pictures), shards)):
        with tarfile.open(folder / f"pairs-{shard}.tar", "w") as archive:
            for number in numbers:
                picture = io.BytesIO()
                Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(picture, "PNG")
                facts = {"caption": [" ".join(draw.choice(WORDS, 6)) for _ in range(2)], "words": f"w{number}"}
                for suffix, content in (("png", picture.getvalue()), ("json", json.dumps(facts).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def toy_config(data: Path, output: Path, *, workers: int = 0, features: Path | None = None, **settings) -> TrainConfig:
    """A run of 12 steps over the toy data, logging every step and saving every fifth."""
    source = SourceConfig(path=str(data / "pairs.jsonl"))
    chosen = {
        "data": DataConfig(
            train=[source],
            validation=[source],
            features=str(features) if features else None,
            feature_views=2,
            transform=TransformConfig(image_px=28),
            batch_size=4,
            workers=workers,
        ),
        "model": ModelConfig(
            vision_encoder=str(data / "encoder"),
            text_encoder=str(data / "text"),
            preset="tiny",
            start_from_text_encoder=False,
            num_queries=4,
            embed_dim=16,
        ),
        "optimiser": OptimiserConfig(lr=3e-3, warmup_steps=3),
        "steps": 12,
        "log_every_steps": 1,
        "checkpoint_every_steps": 5,
        "evaluate_every_steps": 6,
        **settings,
    }
    return TrainConfig(output=str(output), **chosen)


def metric_rows(output: Path) -> list[dict]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own at `place`; skips the test where mounting is not permitted."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
