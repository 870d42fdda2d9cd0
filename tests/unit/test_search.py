"""The index: what it finds equals torch, what it holds equals the folder, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_run import WORDS, toy_config, write_toy_data

import qformers
from qformers.cli import main
from qformers.errors import CheckpointError, ConfigError, DataError
from qformers.evaluation.rerank import pair_scores
from qformers.search import indexing, table
from qformers.search.indexing import index_folder
from qformers.search.table import open_table, scan
from qformers.training.loop import train

TEXT = "a red square of the dark line"
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A trained toy model, `pictures` in two folders and their `about.jsonl`."""
    folder = tmp_path_factory.mktemp("search")
    write_toy_data(folder, pictures=20)
    train(toy_config(folder, folder / "run", steps=4, precision="fp32"))
    (folder / "pictures" / "more").mkdir(parents=True)
    about = []
    for number in range(20):
        path = f"more/it's {number}.png" if number % 2 else f"{number}.png"
        shutil.copy(folder / f"{number}.png", folder / "pictures" / path)
        about.append({"path": path, "caption": f"picture <{number}>", "year": 2000 + number, "place": "Oslo"})
    (folder / "about.jsonl").write_text("".join(json.dumps(row) + "\n" for row in about))
    return folder


@pytest.fixture(scope="module")
def index(data):
    report = index_folder(data / "pictures", str(data / "run"), data / "index", str(data / "about.jsonl"))
    assert (report.added, report.total, report.broken) == (20, 20, [])
    return qformers.Index.open(data / "index")


@pytest.fixture
def mine(data, tmp_path):
    """Pictures of one's own to change: (folder, index folder, a function that indexes)."""
    shutil.copytree(data / "pictures", tmp_path / "pictures")

    def bring_up(**settings):
        return index_folder(tmp_path / "pictures", str(data / "run"), tmp_path / "index", **settings)

    return tmp_path / "pictures", tmp_path / "index", bring_up


def pictures_of(index):
    paths = [row["path"] for row in scan(index.table, ["path"]).to_pylist()]
    return sorted(paths)


def image_vectors(index, paths):
    model = index.model
    return model.encode_image(model.preprocess([index.picture(path) for path in paths])).features


def expect(hits, paths, scores, k):
    """The k best of `scores`, each with its own; pictures closer than the tolerance may change places."""
    k = min(k, len(paths))
    own = torch.tensor([scores[paths.index(hit.path)] for hit in hits])
    torch.testing.assert_close(torch.tensor([hit.similarity for hit in hits]), own, **TOLERANCE)
    torch.testing.assert_close(own, scores.float().topk(k).values, **TOLERANCE)
    assert len(hits) == len({hit.path for hit in hits}) == k


def test_search_by_text_is_torchs_maximum_over_queries(index):
    paths = pictures_of(index)
    scores = index.model.itc([index.picture(path) for path in paths], TEXT)[:, 0]
    expect(index.search(TEXT, k=20), paths, scores, 20)
    expect(index.search(TEXT, k=3), paths, scores, 3)


def test_search_by_picture_and_by_both(index):
    paths = pictures_of(index)
    vectors = image_vectors(index, paths)
    query = index.picture(paths[4])
    own = image_vectors(index, [paths[4]])[0]
    alike = torch.einsum("iqd,rd->irq", vectors, own).amax(-1).mean(-1)
    found = index.search(image=query, k=6)
    expect(found, paths, alike, 6)
    assert found[0].path == paths[4] and found[0].similarity == pytest.approx(1, abs=1e-5)
    told = index.model.itc([index.picture(path) for path in paths], TEXT)[:, 0]
    expect(index.search(TEXT, query, k=20), paths, (alike + told) / 2, 20)


def test_a_filter_is_applied_before_the_shortlist(index):
    chosen = [path for path in pictures_of(index) if int(re.findall(r"\d+", path)[0]) >= 15]
    scores = index.model.itc([index.picture(path) for path in chosen], TEXT)[:, 0]
    hits = index.search(TEXT, k=9, where="year >= 2015 and place = 'Oslo'")
    expect(hits, chosen, scores, 9)
    assert {hit.columns["caption"] for hit in hits} == {f"picture <{number}>" for number in range(15, 20)}
    with pytest.raises(DataError, match=r"jahr.*columns are path, .*year"):
        index.search(TEXT, where="jahr > 3")


@pytest.mark.parametrize("rule", ["itm", "itm+itc", "itm+itc/temperature"])
def test_the_best_are_reranked_by_the_itm_head(index, rule):
    before = index.search(TEXT, k=20)
    hits = index.search(TEXT, k=9, rerank=6, rule=rule)
    shown = [index.picture(hit.path) for hit in before[:6]]
    logits = torch.cat([index.model.match_logits(picture, TEXT) for picture in shown])
    cosines = np.array([hit.similarity for hit in before[:6]])
    scores = pair_scores(logits.numpy(), cosines, rule, index.model.model.temperature.item())
    order = np.argsort(-scores)
    assert [hit.path for hit in hits] == [before[row].path for row in order] + [hit.path for hit in before[6:9]]
    np.testing.assert_allclose([hit.score for hit in hits[:6]], scores[order], atol=1e-5)
    np.testing.assert_allclose([hit.match for hit in hits[:6]], logits.softmax(-1)[order, 1], atol=1e-5)
    assert hits[6].match is None


def test_an_approximate_index_that_looks_everywhere_is_exact_and_takes_in_later_pictures(mine, monkeypatch):
    folder, place, bring_up = mine
    monkeypatch.setattr(table, "MINIMUM_TO_TRAIN", 1)
    draw = np.random.default_rng(3)
    for number in range(60):  # 320 vectors in all: a product quantiser needs 256
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"noise {number}.png")
    bring_up(approximate=True)
    index = qformers.Index.open(place)
    assert len(index.table.list_indices()) == 1
    Image.new("RGB", (30, 20), "green").save(folder / "late.png")
    bring_up(approximate=True)
    paths = pictures_of(index)
    scores = index.model.itc([index.picture(path) for path in paths], TEXT)[:, 0]
    everywhere = table.Approximation(probes=1000, refine=10)
    expect(index.search(TEXT, k=10, approximation=everywhere), paths, scores, 10)
    assert index.search(image=folder / "late.png", k=1, approximation=everywhere)[0].path == "late.png"


def test_more_than_there_is_gives_all_with_a_warning(index, caplog):
    assert len(index.search(TEXT, k=50)) == 20
    assert "holds 20 pictures, fewer than the 50 asked for" in caplog.text


def test_what_cannot_be_searched(index, data):
    with pytest.raises(DataError, match="text has 42 tokens, the limit is 32"):
        index.search(" ".join(["red"] * 40))
    with pytest.raises(DataError, match="empty"):
        index.search(" ")
    with pytest.raises(ConfigError, match="nothing to search for"):
        index.search()
    with pytest.raises(ConfigError, match="there is none"):
        index.search(image=data / "0.png", rerank=3)
    with pytest.raises(DataError, match="absent"):
        index.search(image=data / "absent.png")
    with pytest.raises(DataError, match="there is no index here"):
        qformers.Index.open(data / "nowhere")
    with pytest.raises(CheckpointError):
        qformers.Index.open(data / "index", data / "pictures")


def test_another_model_is_refused_by_both_names(index, data):
    train(toy_config(data, data / "other", steps=6, precision="fp32"))
    both = f"{re.escape(str(data / 'run'))} .* not by {re.escape(str(data / 'other'))}"
    with pytest.raises(ConfigError, match=both):
        qformers.Index.open(data / "index", data / "other")
    with pytest.raises(ConfigError, match=both):
        index_folder(data / "pictures", str(data / "other"), data / "index", str(data / "about.jsonl"))


def test_only_what_changed_is_encoded_again(mine, monkeypatch):
    folder, place, bring_up = mine
    monkeypatch.setattr(indexing, "COMMIT_IMAGES", 3)
    bring_up()
    versions = {row["path"]: row["sha256"] for row in scan(open_table(place)[0], ["path", "sha256"]).to_pylist()}
    (folder / "0.png").unlink()
    shutil.copy(folder / "2.png", folder / "more" / "it's 1.png")
    Image.new("RGB", (30, 20), "red").save(folder / "new.JPG")
    os.utime(folder / "4.png", (0, 0))  # another time, the same bytes
    committed = []
    commit = indexing._commit
    monkeypatch.setattr(indexing, "_commit", lambda *given: committed.extend(given[2]) or commit(*given))
    report = bring_up()
    assert (report.added, report.changed, report.removed, report.unchanged, report.total) == (1, 1, 1, 18, 20)
    assert sorted(picture.row["path"] for picture in committed) == ["more/it's 1.png", "new.JPG"]
    rows = {row["path"]: row for row in scan(open_table(place)[0], ["path", "sha256", "width_px"]).to_pylist()}
    assert rows.keys() == versions.keys() - {"0.png"} | {"new.JPG"}
    assert rows["more/it's 1.png"]["sha256"] == versions["2.png"] and rows["new.JPG"]["width_px"] == 30
    hits = qformers.Index.open(place).search(image=folder / "2.png", k=2)
    assert [hit.path for hit in hits] == ["2.png", "more/it's 1.png"] and hits[1].similarity > 1 - 1e-5
    again = bring_up()
    assert (again.added, again.changed, again.removed, again.unchanged) == (0, 0, 0, 20)


def test_changed_metadata_is_taken_in_and_other_columns_refused(mine, tmp_path):
    _, place, bring_up = mine
    about = tmp_path / "about.csv"
    about.write_text("file_name,caption,stars\n0.png,first,3\n2.png,second,4\n")
    bring_up(metadata=str(about))
    about.write_text("file_name,caption,stars\n0.png,first,5\n2.png,second,4\n")
    assert bring_up(metadata=str(about)).changed == 1
    rows = scan(open_table(place)[0], ["path", "stars", "caption"]).to_pylist()
    assert {row["path"]: row["stars"] for row in rows if row["caption"]} == {"0.png": 5, "2.png": 4}
    with pytest.raises(ConfigError, match=r"columns are stars \(int64\), those given now none"):
        bring_up()
    for content, told in (
        ("file_name,sha256\n0.png,3\n", "sha256: rename"),
        ("name,stars\n0.png,3\n", "no column path, file_name, image; there are: name, stars"),
        ("path,stars\n0.png,3\n0.png,4\n", "0.png is there twice"),
    ):
        about.write_text(content)
        with pytest.raises(DataError, match=told):
            bring_up(metadata=str(about))


def test_broken_pictures_are_counted_and_the_rest_indexed(mine):
    folder, place, bring_up = mine
    bring_up()
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])  # was whole before
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no picture, and none of its suffixes")
    report = bring_up()
    assert [picture.name for picture in report.broken] == ["0.png", "empty.jpg"]
    assert "0 bytes" in report.broken[1].reason
    assert (report.total, report.unchanged) == (19, 19)
    assert "0.png" not in [row["path"] for row in scan(open_table(place)[0], ["path"]).to_pylist()]


def test_folders_that_cannot_be_indexed(mine, data, tmp_path):
    _, place, bring_up = mine
    bring_up()
    (tmp_path / "none").mkdir()
    for folder, told in ((tmp_path / "none", "holds no pictures"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(DataError, match=told):
            index_folder(folder, str(data / "run"), place)
    with pytest.raises(ConfigError, match="is the index of"):
        index_folder(data / "pictures", str(data / "run"), place)
    with indexing.FileLock(place / ".lock"), pytest.raises(ConfigError, match="another indexer"):
        bring_up()


def test_a_kill_before_the_first_commit_is_no_hindrance(mine):
    _, place, bring_up = mine
    (place / "images.lance" / "data").mkdir(parents=True)
    (place / "images.lance" / "data" / "cut.lance").write_bytes(b"half a file")
    with pytest.raises(DataError, match="there is no index here"):
        open_table(place)
    assert bring_up().total == 20
    assert len(qformers.Index.open(place).search(TEXT, k=20)) == 20


def test_readers_see_each_commit_and_none_is_disturbed(mine, monkeypatch):
    folder, place, bring_up = mine
    bring_up()
    reader = qformers.Index.open(place)
    assert len(reader.search(TEXT, k=20)) == 20
    monkeypatch.setattr(indexing, "COMMIT_IMAGES", 2)
    for number in range(6):
        Image.new("RGB", (20, 20 + number), WORDS[4]).save(folder / f"late {number}.png")
    seen = []
    commit = indexing._commit

    def commit_and_read(*given):
        commit(*given)
        seen.append(len(reader.search(TEXT, k=26)))

    monkeypatch.setattr(indexing, "_commit", commit_and_read)
    bring_up()
    assert seen == [22, 24, 26]


def test_the_commands(data, index, tmp_path, capsys):
    place, about = str(tmp_path / "index"), str(data / "about.jsonl")
    line = ["index", str(data / "pictures"), "--model", str(data / "run"), "--index", place, "--metadata", about]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 20
    assert main(line) == 0
    assert re.search(r"unchanged +20\n", capsys.readouterr().out)

    sheet = tmp_path / "sheet.html"
    search = ["search", TEXT, "--index", place, "-k", "4", "--rerank", "4", "--filter", "year < 2010"]
    assert main([*search, "--json", "--html", str(sheet)]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = index.search(TEXT, k=4, rerank=4, where="year < 2010")
    assert [row["path"] for row in found] == [hit.path for hit in expected]
    assert all(0 <= row["match"] <= 1 and row["year"] < 2010 for row in found)
    page = sheet.read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and f"{expected[0].score:.3f}" in page
    assert expected[0].columns["caption"].replace("<", "&lt;").replace(">", "&gt;") in page
    assert main([*search, "--html", str(sheet)]) == 1  # not overwritten
    assert main(search) == 0
    assert [hit.path in capsys.readouterr().out for hit in expected[:1]] == [True]

    parquet = tmp_path / "all.parquet"
    assert main(["export", "--index", place, "--output", str(parquet)]) == 0
    rows = pq.read_table(parquet).to_pylist()
    vectors = torch.tensor([row["vectors"] for row in rows])
    again = image_vectors(index, [row["path"] for row in rows])
    torch.testing.assert_close(vectors, again, **TOLERANCE)
    capsys.readouterr()
    assert main(["export", "--index", place, "--output", str(parquet)]) == 1
    assert "is there already" in capsys.readouterr().err
