"""Every source format from files written here, and every error line."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from qformers.data.config import SourceConfig
from qformers.data.sources import open_source
from qformers.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache_in(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def opened(path: str | Path, **settings) -> list[dict]:
    return list(open_source(SourceConfig(str(path), **settings)))


def test_jsonl_keeps_extra_columns_and_mixes_one_and_many_captions(tmp_path):
    rows = [
        {"image": "a.png", "caption": "a cat", "objects": ["cat"], "image_id": 7},
        {"image": "b.png", "caption": ["a dog", "the dog"], "objects": [], "image_id": 8},
        {"image": "/elsewhere/c.png", "objects": None, "image_id": None},
    ]
    first, second, third = opened(write_jsonl(tmp_path / "a.jsonl", rows))
    assert first == {
        "objects": ["cat"],
        "image": {"bytes": None, "path": str(tmp_path / "a.png")},
        "captions": ["a cat"],
        "image_id": "7",
        "name": "a.png",
    }
    assert second["captions"] == ["a dog", "the dog"] and second["image_id"] == "8"
    assert third["captions"] == [] and third["image_id"] == "/elsewhere/c.png" == third["image"]["path"]


def test_plural_column_images_folder_and_default_id(tmp_path):
    (row,) = opened(write_jsonl(tmp_path / "a.jsonl", [{"image": "x/a.png", "captions": ["a"]}]), images="/pictures")
    assert row["image"]["path"] == "/pictures/x/a.png" and row["image_id"] == "x/a.png"


def test_json_list_and_jsonl_under_the_wrong_suffix(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}], indent=1))
    assert opened(tmp_path / "list.json")[0]["captions"] == ["a"]
    lines = write_jsonl(tmp_path / "lines.json", [{"image": "a.png", "caption": "b"}] * 2)
    assert [row["captions"] for row in opened(lines)] == [["b"], ["b"]]


def test_csv_reads_every_cell_as_text(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "caption", "image_id"], ["a.png", "None, it is", "007"], ["b.png", "NA", "1"]]
        )
    first, second = opened(tmp_path / "a.csv")
    assert first["captions"] == ["None, it is"] and first["image_id"] == "007" and second["captions"] == ["NA"]
    (tmp_path / "b.tsv").write_text("image\tcaption\na.png\thi, there\n")
    assert opened(tmp_path / "b.tsv")[0]["captions"] == ["hi, there"]


def test_coco_groups_the_captions_of_an_image(tmp_path):
    content = {
        "info": {},
        "images": [
            {"id": 9, "file_name": "9.jpg"},
            {"id": 4, "file_name": "4.jpg"},
            {"id": 5, "file_name": "5.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "four"},
            {"id": 2, "image_id": 9, "caption": "nine"},
            {"id": 3, "image_id": 4, "caption": "four again"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    rows = opened(tmp_path / "captions.json", images="val")
    assert [(row["image_id"], row["captions"], row["name"]) for row in rows] == [
        ("9", ["nine"], "9.jpg"),
        ("4", ["four", "four again"], "4.jpg"),
        ("5", [], "5.jpg"),
    ]
    assert rows[0]["image"] == {"path": "val/9.jpg", "bytes": None}
    content["annotations"].append({"image_id": 77, "caption": "stray"})
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"captions.json: 1 of 4 annotations belong to no image there"):
        opened(tmp_path / "captions.json")


def test_karpathy_counts_restval_as_train(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": f"{split}.jpg",
            "split": split,
            "sentences": [{"raw": split}],
            "cocoid": n,
        }
        for n, split in enumerate(["train", "restval", "val", "test"])
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    names = {
        split: [row["name"] for row in opened(tmp_path / "dataset_coco.json", split=split)]
        for split in ("train", "test", None)
    }
    assert names["train"] == ["val2014/train.jpg", "val2014/restval.jpg"] and names["test"] == ["val2014/test.jpg"]
    assert len(names[None]) == 4
    with pytest.raises(DataError, match="no records of split 'tset'"):
        opened(tmp_path / "dataset_coco.json", split="tset")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_image_folder_with_metadata_in_splits(tmp_path, suffix):
    for split in ("train", "test"):
        text = {
            "jsonl": json.dumps({"file_name": f"{split}.png", "text": f"a {split}"}) + "\n",
            "csv": f"file_name,text\n{split}.png,a {split}\n",
        }
        write_jsonl(tmp_path / split / f"metadata.{suffix}", [text[suffix].rstrip()])
    (row,) = opened(tmp_path, split="test")
    assert row["captions"] == ["a test"] and row["image"]["path"] == str(tmp_path / "test" / "test.png")
    with pytest.raises(DataError, match=r"sub-folders: .*test, train; set split"):
        opened(tmp_path)


def test_parquet_with_embedded_pictures_and_with_paths(tmp_path):
    pictures = [{"bytes": png("red"), "path": "r.png"}, {"bytes": png("blue"), "path": None}]
    table = pa.table({"image": pictures, "caption": ["red", "blue"], "concept": ["r", "b"]})
    pa.parquet.write_table(table, tmp_path / "embedded-0.parquet")
    first, second = opened(tmp_path / "embedded-*.parquet")
    assert first["image"] == pictures[0] and first["image_id"] == "r.png" and first["concept"] == "r"
    assert second["image"]["bytes"] == pictures[1]["bytes"] and second["name"].endswith("record 1")
    pa.parquet.write_table(pa.table({"image": ["p.png"], "caption": [["one", "two"]]}), tmp_path / "paths.parquet")
    (row,) = opened(tmp_path / "paths.parquet")
    assert row["image"] == {"path": str(tmp_path / "p.png"), "bytes": None} and row["captions"] == [
        "one",
        "two",
    ]
    bare = pa.table({"photo": [png()], "caption": ["bare"], "image": ["not this"]})
    pa.parquet.write_table(bare, tmp_path / "bare.parquet")
    assert opened(tmp_path / "bare.parquet", image_column="photo")[0]["image"]["bytes"] == png()


def test_split_picks_rows_by_column(tmp_path):
    rows = [{"image": f"{n}.png", "caption": "x", "split": "train" if n % 2 else "val"} for n in range(6)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [row["name"] for row in opened(path, split="train")] == ["1.png", "3.png", "5.png"]
    path = write_jsonl(tmp_path / "b.jsonl", [{"image": "a.png", "caption": "x"}])
    with pytest.raises(DataError, match="no column 'split'; there are: image, caption"):
        opened(path, split="train")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_webdataset_mixes_picture_formats_and_kinds_of_words(tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (5, 5)).save(jpeg, "JPEG")
    write_tar(tmp_path / "00.tar", {"0.jpg": jpeg.getvalue(), "0.txt": b"a jpeg", "1.png": png(), "1.cap": b"a png"})
    facts = json.dumps({"caption": ["one", "two"], "image_id": 12, "objects": ["x"]}).encode()
    write_tar(tmp_path / "01.tar", {"0.webp": png(), "0.json": facts, "1.txt": b"no picture"})
    rows = opened(tmp_path)
    assert [row["captions"] for row in rows] == [["a jpeg"], ["a png"], ["one", "two"], ["no picture"]]
    # Shards that count their samples alike hold different pictures.
    assert [row["image_id"] for row in rows] == ["00.tar/0", "00.tar/1", "12", "01.tar/1"]
    assert rows[0]["image"] == {"bytes": jpeg.getvalue(), "path": "00.tar/0.jpg"} and rows[2]["json"]["objects"] == [
        "x"
    ]
    assert rows[3]["image"] == {"path": "", "bytes": None}
    (tmp_path / "01.tar").write_bytes((tmp_path / "01.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"01.tar: not a readable tar"):
        opened(tmp_path)


def test_a_changed_file_is_read_again_even_with_the_same_time_of_change(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.png", "caption": "old"}])
    times = os.stat(path)
    assert opened(path)[0]["captions"] == ["old"]
    write_jsonl(tmp_path / "a.jsonl", [{"image": "a.png", "caption": "newer"}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert opened(path)[0]["captions"] == ["newer"]


def test_nothing_is_printed_and_no_picture_is_opened(tmp_path, capfd):
    assert opened(write_jsonl(tmp_path / "a.jsonl", [{"image": "not there.png", "caption": "a"}]))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("file", "content", "settings", "message"),
    [
        ("none.jsonl", None, {}, r"none.jsonl: no such file"),
        ("a.jsonl", "", {}, r"a.jsonl: the file is empty \(0 bytes\)"),
        ("a.csv", "", {}, r"a.csv: the file is empty"),
        ("a.csv", "image,caption\n", {}, r"a.csv: no records"),
        ("a.json", "", {}, r"a.json: the file is empty"),
        ("a.json", "[]", {}, r"a.json: no records"),
        ("a.json", '{"foo": 1}', {}, r"a.json: unknown JSON layout \(an object with foo\); known are"),
        ("a.json", '[{"image": ', {}, r"a.json: not JSON: .*line 1"),
        ("a.json", '{"images": [{}], "annotations": []}', {}, r"a.json: not COCO captions: KeyError\('id'\)"),
        ("a.xyz", "x", {}, r"a.xyz: no format is known for '.xyz'; set format"),
        ("a.jsonl", '{"image": "a"}\n', {}, r"a.jsonl: no column 'caption'; there are: image\. Set caption"),
        ("a.csv", "picture,caption\na,b\n", {}, r"no column .image.; there are: picture, caption\."),
        ("a.jsonl", '{"image": "a", "captions": "b"}\n', {"caption_column": "words"}, r"no column 'words'"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n', {"id_column": "key"}, r"no column .key..*Set id"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n\n{"b", "cap\n', {}, r"a.jsonl: line 3 is not"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n["c"]\n', {}, r"a.jsonl: line 2 is not"),
        ("a.csv", 'image,caption\na,b\na,b,c,d\n', {}, r"a.csv: cannot be read as csv: .*line 3"),
        ("a.parquet", "PAR", {}, r"a.parquet: cannot be read as parquet"),
        ("a.tar", "no tar", {}, r"a.tar: not a readable tar"),
    ],
)  # fmt: skip
def test_one_clear_line(tmp_path, file, content, settings, message):
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        opened(tmp_path / file, **settings)
    assert "\n" not in str(raised.value)


def test_unknown_format_and_a_split_that_cannot_be(tmp_path):
    config = SourceConfig(str(tmp_path))
    object.__setattr__(config, "format", "zip")  # past the type check that only the tests have
    with pytest.raises(ConfigError, match="format is 'zip': it must be one of auto, jsonl"):
        open_source(config)
    write_tar(tmp_path / "0.tar", {"0.png": png(), "0.txt": b"x"})
    with pytest.raises(ConfigError, match="format webdataset has no splits"):
        opened(tmp_path / "0.tar", split="train")
    with pytest.raises(DataError, match="imagefolder' needs a folder"):
        opened(tmp_path / "0.tar", format="imagefolder")
