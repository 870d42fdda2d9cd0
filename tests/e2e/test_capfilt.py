"""CapFilt as a user runs it, local engine: what is written, that training reads it, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_capfilt import (
    SAMPLING,
    clean,
    files_of,
    rows_of,
    same_captions,
    save_toy_captioner,
    save_toy_ranker,
    write_toy_capfilt,
)
from toy_run import toy_config

from qformers.capfilt import captioner as captioners
from qformers.capfilt.config import RankingConfig, WorkConfig
from qformers.capfilt.ranker import OwnRanker
from qformers.cli import main
from qformers.data.config import SourceConfig, TransformConfig
from qformers.data.dataset import CaptionDataset
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.errors import CheckpointError, ConfigError, DataError
from qformers.models.saving import load_model, save_model
from qformers.models.vision import VisionEncoder
from qformers.training.loop import train

PICTURES = 16
ONE_BY_ONE = WorkConfig(batch_size=1, threads=1, devices=["cpu"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("capfilt")
    write_toy_capfilt(folder, PICTURES)
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "backwards.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def cleaned(data) -> Path:
    clean(data, data / "cleaned")
    return data / "cleaned"


def test_every_picture_keeps_its_two_best_with_scores_and_origins(data, cleaned):
    rows, accounts = list(rows_of(cleaned)), list(rows_of(cleaned, "accounts/*"))
    assert [row["image"] for row in rows] == [str(data / f"{number}.png") for number in range(PICTURES)]
    for row, account in zip(rows, accounts, strict=True):
        ranked = [one for one in account["candidates"] if one["score"] is not None]
        best = sorted(ranked, key=lambda one: -one["score"])[:2]
        assert row["captions"] == [one["caption"] for one in best]
        assert row["scores"] == [one["score"] for one in best] and row["origins"] == [one["origin"] for one in best]
        assert sum(one["origin"] == "synthetic" for one in account["candidates"]) == SAMPLING.captions
    statistics = json.loads((cleaned / "statistics.json").read_text())
    assert statistics["pictures"] == PICTURES and statistics["kept"] == 2 * PICTURES
    assert sum(statistics["captions"]["web"].values()) == PICTURES
    before = files_of(cleaned)
    assert clean(data, cleaned).as_dict() == statistics  # nothing is left to do, and nothing is forgotten
    assert files_of(cleaned) == before
    page = (cleaned / "report.html").read_text()
    assert (
        "captions kept of" in page and page.count("<article") > 10 and "http" not in page.replace("http://www.w3", "")
    )


def test_batch_order_and_number_of_processes_change_nothing(data, cleaned, tmp_path):
    clean(data, tmp_path / "alone", work=ONE_BY_ONE)
    assert same_captions(tmp_path / "alone", cleaned)
    clean(data, tmp_path / "two", work=WorkConfig(batch_size=3, threads=1, devices=["cpu", "cpu"]))
    assert files_of(tmp_path / "two") == files_of(cleaned)
    clean(data, tmp_path / "backwards", source="backwards.jsonl")
    kept = [[row["captions"] for row in rows_of(output)] for output in (tmp_path / "backwards", cleaned)]
    assert kept[0] == kept[1][::-1]
    clean(data, tmp_path / "seed", sampling=replace(SAMPLING, seed=1))
    assert files_of(tmp_path / "seed") != files_of(cleaned)


@pytest.mark.parametrize("shard_format", ["jsonl", "webdataset"])
def test_training_reads_it_and_draws_one_of_the_kept_captions(shard_format, data, cleaned, tmp_path):
    clean(data, tmp_path, shard_format=shard_format)
    records = open_source(SourceConfig(str(tmp_path)))
    rows = list(rows_of(cleaned))
    assert records["captions"][:] == [row["captions"] for row in rows]
    assert records["image_id"][:] == [f"{number}.png" for number in range(PICTURES)]
    told = CaptionTokenizer.from_pretrained(data / "text")
    transform = TransformConfig(image_px=28, mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = CaptionDataset(records, told, transform, train=True)
    drawn = Counter(tuple(dataset[epoch, 0].input_ids.tolist()) for epoch in range(60))
    assert drawn.keys() == {tuple(told.encode_one(caption)) for caption in rows[0]["captions"]}
    assert len(drawn) == 2 and min(drawn.values()) > 15
    config = toy_config(data, tmp_path / "again", steps=4, precision="fp32")
    train(replace(config, data=replace(config.data, train=[SourceConfig(str(tmp_path))], validation=[])))


def test_the_loop_of_the_paper_goes_round(data, cleaned, tmp_path):
    """Train, bootstrap captions, train again on them, from the command line."""
    source = f"[{{path: {cleaned}}}]"
    recipe = Path(__file__).parents[2] / "recipes/debug.yaml"
    arguments = ["--data.train", source, "--data.batch_size", "4", "--steps", "6", "--precision", "fp32"]
    arguments += ["--model.vision_encoder", str(data / "encoder"), "--model.text_encoder", str(data / "text")]
    arguments += ["--data.transform.image_px", "28", "--output", str(tmp_path / "again")]
    assert main(["train", str(recipe), *arguments]) == 0
    clean(data, tmp_path / "cleaned_again", ranker=str(tmp_path / "again"))
    assert len(list(rows_of(tmp_path / "cleaned_again"))) == PICTURES


def test_the_ranker_reads_the_captioner_s_image_encoder_pass(data, tmp_path, monkeypatch):
    seen, forward = [], VisionEncoder.forward
    monkeypatch.setattr(
        VisionEncoder, "forward", lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels)
    )
    clean(data, tmp_path / "shared", ranking=RankingConfig(judge=str(data / "stage1")))
    assert sum(seen) == PICTURES
    seen.clear()
    other = load_model(data / "stage1")
    with torch.no_grad():
        next(other.model.vision_encoder.parameters()).add_(0.1)
    save_model(other.model, other.config, CaptionTokenizer.from_pretrained(data / "text"), tmp_path / "other")
    clean(data, tmp_path / "apart", ranker=str(tmp_path / "other"))
    assert sum(seen) == 2 * PICTURES


def test_the_judge_and_the_lowest_score_leave_pictures_out(data, cleaned, tmp_path):
    found = clean(data, tmp_path / "judged", ranking=RankingConfig(judge=str(data / "stage1"), min_match=1.0))
    assert found.kept == 0 and found.without_caption == PICTURES
    assert found.captions["web"]["unmatched"] == PICTURES and not list(rows_of(tmp_path / "judged"))
    assert (tmp_path / "judged" / "report.html").exists()
    scores = [score for row in rows_of(cleaned) for score in row["scores"]]
    middle = float(np.median(scores))
    clean(data, tmp_path / "lowest", ranking=RankingConfig(min_score=middle))
    assert sorted(s for row in rows_of(tmp_path / "lowest") for s in row["scores"]) == sorted(
        s for s in scores if s >= middle
    )


@pytest.mark.parametrize("kind", ["blip", "git", "vit-gpt2"])
def test_hugging_face_s_captioners_and_rankers_do_it_too(kind, data, tmp_path):
    save_toy_captioner(kind, tmp_path / kind)
    save_toy_ranker("clip", tmp_path / "clip")
    models = {"captioner": str(tmp_path / kind), "ranker": str(tmp_path / "clip")}
    clean(data, tmp_path / "cleaned", **models)
    clean(data, tmp_path / "alone", **models, work=ONE_BY_ONE)
    assert same_captions(tmp_path / "cleaned", tmp_path / "alone")
    assert {"web", "synthetic"} == {origin for row in rows_of(tmp_path / "cleaned") for origin in row["origins"]}


def test_a_bad_list_is_counted_and_named(data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()[:4]]
    (data / "broken.png").write_bytes(b"no picture")
    bad = [
        {"image": "broken.png", "caption": "a cat"},
        {"image": "absent.png", "caption": "a dog"},
        {**rows[0], "caption": "the red line"},  # a second record of the first picture
        {"image": "4.png", "caption": " . "},
        {"image": "5.png", "caption": "красный кот"},
        {"image": "6.png", "caption": None},
        {"image": "7.png", "caption": "word " * 400},
    ]
    (data / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + bad))
    arguments = [
        "--captioner",
        str(data / "stage2"),
        "--ranker",
        str(data / "stage1"),
        "--output",
        str(tmp_path / "bad"),
    ]
    arguments += ["--captions", "3", "--max_new_tokens", "6", "--min_new_tokens", "2", "--threads", "1", "--json"]
    assert main(["capfilt", str(data / "bad.jsonl"), *arguments]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["pictures"], found["broken"], found["without_caption"]) == (10, 2, 0)
    assert "left out: broken.png: not a picture" in said.err and "left out: absent.png: no such file" in said.err
    web = {verdict: count for verdict, count in found["captions"]["web"].items() if count}
    assert (web.pop("empty"), web.pop("other_script")) == (1, 1) and sum(web.values()) == 6
    accounts = list(rows_of(tmp_path / "bad", "accounts/*"))
    assert len(accounts) == 10 and [account["broken"] is None for account in accounts].count(False) == 2
    assert [one["caption"] for one in accounts[0]["candidates"][:2]] == [rows[0]["caption"], "the red line"]
    assert len(list(rows_of(tmp_path / "bad"))) == 8


def test_scores_that_are_not_finite_are_refused_in_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr(OwnRanker, "score", lambda self, encoded, texts: [[float("nan")] * len(of) for of in texts])
    with pytest.raises(DataError, match=r"stage1: its score of 0.png and '.*' is nan: a ranker must give finite"):
        clean(data, tmp_path / "nan")


def test_what_cannot_be_done_is_refused_before_any_caption_is_written(data, cleaned, tmp_path):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "0.png")
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        archive.add(tmp_path / "0.png", "0.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused = [
        (
            lambda: clean(data, cleaned, sampling=replace(SAMPLING, seed=1)),
            ConfigError,
            "another run, whose seed was 0 and",
        ),
        (lambda: clean(data, cleaned, source="backwards.jsonl"), ConfigError, "another run, whose source was"),
        (lambda: clean(data, tmp_path / "mine"), ConfigError, "mine: holds notes.txt and no captions of this command"),
        (lambda: clean(data, tmp_path / "mine/notes.txt"), ConfigError, "is a file"),
        (lambda: clean(data, tmp_path / "x", source="none.jsonl"), DataError, "no such file"),
        (lambda: clean(data, tmp_path / "x", ranker=str(data / "stage2")), CheckpointError, "no ITC and ITM heads"),
        (
            lambda: clean(tmp_path, tmp_path / "x", source="one.tar", **both(data)),
            DataError,
            "--shard_format webdataset",
        ),
    ]
    for run, error, said in refused:
        with pytest.raises(error, match=said) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def both(data: Path) -> dict[str, str]:
    return {"captioner": str(data / "stage2"), "ranker": str(data / "stage1")}


def test_a_shard_that_fails_is_tried_again_and_one_that_goes_on_failing_is_named(data, cleaned, tmp_path, monkeypatch):
    tried: Counter[str] = Counter()
    write = captioners.OwnCaptioner.write

    def fails(times: dict[str, int]):
        def writes(self, encoded, draws):
            # the toy pictures are told apart by their first value
            name = str(float(encoded.flatten()[0]))
            tried[name] += 1
            if tried[name] <= times.get(name, 0):
                raise RuntimeError("out of\nmemory")
            return write(self, encoded, draws)

        return writes

    clean_once = WorkConfig(batch_size=8, threads=1, devices=["cpu"])
    monkeypatch.setattr(captioners.OwnCaptioner, "write", fails({}))
    clean(data, tmp_path / "names", work=clean_once)
    middle = list(tried)[1]
    for times, output in ((2, "mended"), (99, "failed")):
        tried.clear()
        monkeypatch.setattr(captioners.OwnCaptioner, "write", fails({middle: times}))
        if times == 2:
            clean(data, tmp_path / output, work=clean_once)
            assert tried[middle] == 3 and same_captions(tmp_path / output, cleaned)
            continue
        said = r"1 of 2 shards failed 3 times: 1; shard 1 \(pictures 8 to 15\): RuntimeError: out of memory; the others"
        with pytest.raises(DataError, match=said):
            clean(data, tmp_path / output, work=clean_once)
        assert tried[middle] == 3
    monkeypatch.setattr(captioners.OwnCaptioner, "write", write)
    clean(data, tmp_path / "failed", work=clean_once)
    assert same_captions(tmp_path / "failed", cleaned)


def test_two_at_once_is_refused(data, tmp_path):
    from filelock import FileLock

    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"), pytest.raises(ConfigError, match="another process is writing to it"):
        clean(data, tmp_path / "busy")


def test_without_ray_one_line_says_how_to_get_it(data, tmp_path):
    line = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest)\n"
        "from qformers.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [
        "capfilt",
        "x.jsonl",
        "--captioner",
        "c",
        "--ranker",
        "r",
        "--output",
        str(tmp_path),
        "--engine",
        "ray",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", line, *arguments], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (
        1,
        "error: the ray engine needs Ray Data: pip install 'qformers[scale]'\n",
    )
