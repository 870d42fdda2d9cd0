"""The validation report of a source with one of every fault."""

from __future__ import annotations

import io
import json

import datasets
import pytest
from PIL import Image
from rich.console import Console

from qformers.data.config import SourceConfig
from qformers.data.text import CaptionTokenizer
from qformers.data.validate import validate_source
from qformers.errors import DataError


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (10, 4)).save(tmp_path / "a.png")
    Image.new("L", (20, 8)).save(tmp_path / "b.jpg")
    Image.new("RGBA", (60, 9)).save(tmp_path / "c.webp")
    (tmp_path / "zero.png").write_bytes(b"")
    rows = [
        {"image": "a.png", "caption": ["A cat.", "a cat", "one two three four"], "image_id": "1"},
        {"image": "a.png", "caption": "again", "image_id": "1"},
        {"image": "b.jpg", "caption": "a dog", "image_id": "2"},
        {"image": "c.webp", "caption": "!!", "image_id": "2"},
        {"image": "zero.png", "caption": "a cat", "image_id": "4"},
        {"image": "gone.png", "caption": [], "image_id": "5"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(tmp_path / "rows.jsonl"))


def test_report_finds_every_fault(source, tmp_path, capfd):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    report = validate_source(source, CaptionTokenizer.from_pretrained(tmp_path, max_tokens=5), workers=2)
    assert capfd.readouterr() == ("", "")  # progress is for terminals
    found = report.as_dict()
    assert found == json.loads(json.dumps(found))
    assert found == {
        "records": 6,
        "images": 4,
        "captions": 6,
        "captions_per_image": {"min": 0, "middle": 1.5, "max": 4},
        "width_px": {"min": 10, "middle": 20, "max": 60},
        "height_px": {"min": 4, "middle": 8, "max": 9},
        "formats": {"PNG": 1, "JPEG": 1, "WEBP": 1},
        "modes": {"RGB": 1, "L": 1, "RGBA": 1},
        "broken": [
            {"name": "zero.png", "reason": "the file is empty (0 bytes)"},
            {"name": "gone.png", "reason": "no such file or directory"},
        ],
        "empty_captions": ["c.webp", "gone.png"],
        "duplicate_ids": 2,
        "clashing_ids": ["2"],
        "duplicate_captions": 2,
        "too_long_captions": 1,
    }


def test_table_shows_it(source):
    console = Console(file=io.StringIO(), width=120)
    report = validate_source(source)
    console.print(report.table())
    text = console.file.getvalue()
    for shown in (
        "10 / 20 / 60",
        "zero.png: the file is empty (0 bytes)",
        "PNG 1, JPEG 1, WEBP 1",
        "0 / 1.5 / 4",
    ):
        assert shown in text
    assert report.too_long_captions is None and "token limit" not in text


def test_nothing_but_broken_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.csv").write_text("image,caption\n[red].png,a cat\n")
    report = validate_source(SourceConfig(str(tmp_path / "a.csv")))
    assert report.width_px is None and len(report.broken) == 1
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    assert "[red].png: no such file" in console.file.getvalue()
    with pytest.raises(DataError, match="no such file"):
        validate_source(SourceConfig(str(tmp_path / "b.csv")))
