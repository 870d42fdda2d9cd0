"""Examples and batches: random choices, resumption, workers, broken pictures, retrieval views, the tally."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qformers.data.batch import Batch, BrokenImage
from qformers.data.broken import BrokenTally
from qformers.data.config import SourceConfig, TransformConfig
from qformers.data.dataset import CaptionDataset, Example, collate, make_loader
from qformers.data.sampling import EpochSampler
from qformers.data.shards import RecordList
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import evaluation_transform
from qformers.errors import ConfigError, DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(12))]
TRANSFORM = TransformConfig(16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures: 1 is damaged, 3 has an empty caption, 11 shows 0 again."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for n in range(12):
        pixels = np.random.default_rng(n).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        captions = [" ".join([f"w{n}"] * (1 + each)) for each in range(1 + n % 3)]
        rows.append({"image": f"{n}.png", "caption": captions, "image_id": n})
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    rows[3]["caption"] = [" ... "]
    rows[11] |= {"image": "0.png", "image_id": 0}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def make(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        records = open_source(SourceConfig(str(folder / "rows.jsonl")))

    def make(train: bool = True, **settings) -> CaptionDataset:
        tokenizer = CaptionTokenizer.from_pretrained(folder, **settings.pop("tokenizer", {}))
        return CaptionDataset(records, tokenizer, TRANSFORM, train, **settings)

    return make


def equal(first: Batch | Example | BrokenImage, second: Batch | Example | BrokenImage) -> bool:
    if type(first) is not type(second):
        return False
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_random_choices_depend_on_seed_epoch_and_index_alone(make):
    dataset = make()
    there = [dataset[epoch, index] for epoch in range(3) for index in range(12)]
    back = [dataset[epoch, index] for epoch in reversed(range(3)) for index in reversed(range(12))][::-1]
    assert all(map(equal, there, back)) and all(equal(dataset[1, n], make()[1, n]) for n in range(12))
    assert not equal(dataset[0, 0], dataset[1, 0]) and not equal(dataset[0, 0], make(seed=1)[0, 0])


def test_every_caption_is_drawn(make):
    dataset = make()
    lengths = [len(dataset[epoch, 2].input_ids) for epoch in range(60)]
    assert {3, 4, 5} == set(lengths) and min(map(lengths.count, {3, 4, 5})) > 8


def test_evaluation_shows_the_first_caption_and_the_centre(make, folder):
    example = make(train=False)[5, 2]
    assert example.input_ids.tolist() == [2, 7, 3] and example.name == "2.png"
    assert torch.equal(example.pixel_values, evaluation_transform(Image.open(folder / "2.png"), TRANSFORM))


def test_same_image_id_same_integer(make):
    dataset = make()
    assert dataset.image_ids[11] == dataset.image_ids[0]
    assert len(set(dataset.image_ids.tolist())) == 11
    assert dataset[0, 11].image_id == dataset[0, 0].image_id


def test_what_cannot_be_used_is_named_with_its_reason(make):
    damaged, empty = make()[0, 1], make()[0, 3]
    assert damaged.name == "1.png" and "truncated" in damaged.reason and "1.png" not in damaged.reason
    assert empty == BrokenImage("3.png", "caption 0 is empty after cleaning: ' ... '")
    refused = make(train=False, tokenizer={"max_tokens": 3, "too_long": "error"}).records[2]
    strict = make(tokenizer={"max_tokens": 3, "too_long": "error"})
    broken = [each for epoch in range(9) if isinstance(each := strict[epoch, 2], BrokenImage)]
    assert (
        broken and broken[0].name == refused["name"] and "tokens, the limit is 3: it would be cut" in broken[0].reason
    )


class Store:
    """Features that say which row and view they are; row 5 was broken when they were made."""

    views = 4

    def read(self, index: int, view: int) -> torch.Tensor:
        if index == 5:
            raise DataError("store: record 5 had a broken picture")
        return torch.full((2, 3), float(10 * index + view), dtype=torch.bfloat16)


def test_features_are_read_instead_of_pictures(make):
    dataset = make(features=Store())
    seen = [dataset[epoch, 2].patch_embeds[0, 0].item() for epoch in range(60)]
    assert set(seen) == {20, 21, 22, 23} and dataset[0, 2].pixel_values is None
    # The damaged file is not opened, and training and evaluation differ in the view alone.
    assert make(train=False, features=Store())[3, 1].patch_embeds[0, 0] == 10
    assert dataset[0, 5] == BrokenImage("5.png", "store: record 5 had a broken picture")
    batch = collate([dataset[0, 2], dataset[0, 5], dataset[0, 4]])
    assert batch.patch_embeds.shape == (2, 2, 3) and batch.pixel_values is None


def test_retrieval_views(make):
    dataset = make()
    images, captions = dataset.images(), dataset.captions()
    assert len(images) == 11
    batch = collate([images[n] for n in range(11)])
    assert batch.names == tuple(f"{n}.png" for n in range(11) if n != 1) and batch.broken[0].name == "1.png"
    by_image = {
        n: [t for t, i in zip(captions.texts, captions.text_to_image, strict=True) if i == n] for n in range(11)
    }
    assert by_image[2] == ["w2", "w2 w2", "w2 w2 w2"] and by_image[3] == [] and captions.empty == ["3.png"]
    assert by_image[0] == ["w0", "w11", "w11 w11", "w11 w11 w11"]


def test_collate_pads_to_the_longest_and_lists_the_broken(make):
    dataset = make(train=False)
    long = Example(torch.tensor([2, 5, 6, 7, 3]), 7, "long", pixel_values=torch.zeros(3, 16, 16))
    batch = collate([dataset[0, 0], dataset[0, 1], long], pad_id=0)
    assert batch.input_ids.tolist() == [[2, 5, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch.attention_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.image_ids.dtype == torch.int64 and batch.image_ids.tolist() == [dataset.image_ids[0], 7]
    assert len(batch) == 2 and batch.pixel_values.shape == (2, 3, 16, 16) and batch.broken[0].name == "1.png"


@pytest.mark.parametrize("examples", [[], [BrokenImage("a", "x"), BrokenImage("b", "y")]])
def test_a_batch_of_broken_pictures_has_length_0(examples):
    batch = collate(examples)
    assert len(batch) == 0 and batch.broken == tuple(examples)
    assert batch.pixel_values is None and batch.patch_embeds is None and len(batch.to("cpu")) == 0


@given(st.integers(1, 40), st.data(), st.integers(0, 5))
def test_sampler_resumes_anywhere_and_visits_all_once_an_epoch(length, data, seed):
    batch_size = data.draw(st.integers(1, length))
    start = data.draw(st.integers(0, 30))
    steps = list(itertools.islice(EpochSampler(length, batch_size, seed), start + 10))
    assert list(itertools.islice(EpochSampler(length, batch_size, seed, start), 10)) == steps[start:]
    assert list(EpochSampler(length, batch_size, seed, start, stop_step=start + 10)) == steps[start:]
    per_epoch = length // batch_size
    first_epoch = [index for batch in steps[:per_epoch] for _, index in batch]
    assert len(set(first_epoch)) == len(first_epoch) <= length
    assert all(epoch == step // per_epoch for step, batch in enumerate(steps) for epoch, _ in batch)


def test_sampler_reshuffles_and_splits_the_global_batch():
    first, second = itertools.islice(EpochSampler(16, 16), 2)
    assert [index for _, index in first] != [index for _, index in second]
    ranks = [itertools.islice(EpochSampler(17, 6, 3, 2, rank=rank, world_size=3), 8) for rank in range(3)]
    whole = itertools.islice(EpochSampler(17, 6, 3, 2), 8)
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == list(whole)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 5))
def test_a_group_stays_together_and_groups_are_shuffled(values, batch_size, seed):
    _, groups = np.unique(values, return_inverse=True)
    batch_size = min(batch_size, len(values))
    sampler = EpochSampler(len(values), batch_size, seed, groups=groups)
    steps = list(itertools.islice(sampler, 3 * sampler.steps_per_epoch))
    orders = [
        [index for batch in steps[epoch * sampler.steps_per_epoch :][: sampler.steps_per_epoch] for _, index in batch]
        for epoch in range(3)
    ]
    for order in orders:
        assert len(set(order)) == len(order) == sampler.steps_per_epoch * batch_size
        runs = [group for group, _ in itertools.groupby(groups[order])]
        assert len(set(runs)) == len(runs)  # none is cut in two
    if groups.max() >= 5 and batch_size == 1:
        assert orders[0] != orders[1] or orders[1] != orders[2]


def test_records_of_one_value_come_one_after_another(make):
    scenes = ["a", None, "b", None, "a", "b"] * 2
    dataset = make()
    column = datasets.Dataset.from_dict({"scene": scenes})
    dataset.records = datasets.concatenate_datasets([dataset.records, column], axis=1)
    order = [index for batch in make_loader(dataset, 4, together_column="scene", stop_step=3).batch_sampler
             for _, index in batch]  # fmt: skip
    assert sorted(order) == list(range(12))
    for value in ("a", "b"):
        places = [place for place, index in enumerate(order) if scenes[index] == value]
        assert places == list(range(places[0], places[0] + 4))
    with pytest.raises(DataError, match=r"no column 'film' for data.together_column; there are: .*scene"):
        make_loader(dataset, 4, together_column="film")


def test_weighted_sources_keep_groups_together_and_are_mixed_in_a_batch(make):
    scenes = ["a", "b", "a", "b", "c", "d", "c", "d", "e", "f", "e", "f"]
    first, second = make(), make()
    column = datasets.Dataset.from_dict({"scene": scenes})
    tables = [datasets.concatenate_datasets([one.records, column], axis=1) for one in (first, second)]
    first.records = RecordList(tables, [1.0, 1.0])
    loader = make_loader(first, 8, together_column="scene", stop_step=6)
    batches = [[index for _, index in batch] for batch in loader.batch_sampler]
    assert any(max(batch[:4]) >= 12 for batch in batches) and any(min(batch[:4]) < 12 for batch in batches)
    for batch in batches:
        for start in (0, 12):
            rows = [index - start for index in batch if start <= index < start + 12]
            assert len(rows) == 4 and len({scenes[row] for row in rows}) == 2
    turns = make_loader(first, 4, together_column="scene", stop_step=6, whole_batches=True)
    batches = [[index for _, index in batch] for batch in turns.batch_sampler]
    assert [{index >= 12 for index in batch} for batch in batches] == [{False}, {True}] * 3
    assert all(len({scenes[index % 12] for index in batch}) == 2 for batch in batches)


def test_sampler_refuses_what_cannot_be():
    with pytest.raises(DataError, match="the data set has 7 records, the batch size is 8"):
        EpochSampler(7, 8)
    with pytest.raises(ConfigError, match=r"batch_size is 8 for 3 process\(es\)"):
        EpochSampler(100, 8, world_size=3)


def test_workers_and_resumption_give_identical_batches(make):
    alone = list(itertools.islice(make_loader(make(), 5, seed=2), 6))
    assert any(batch.broken for batch in alone)
    shared = list(make_loader(make(), 5, seed=2, start_step=2, stop_step=6, workers=2))
    assert len(shared) == 4
    assert all(map(equal, alone[2:], shared))


def batch_of(whole: int, *broken: str) -> Batch:
    good = [Example(torch.tensor([2, 3]), 0, "fine", pixel_values=torch.zeros(3, 2, 2))] * whole
    return collate([*good, *(BrokenImage(name, "it is cut off") for name in broken)])


def test_tally_names_each_once_and_stops_past_the_limit(tmp_path):
    tally = BrokenTally(tmp_path / "broken.tsv")
    tally.add(batch_of(97, "a.png", "b.png"))  # 99 seen: too few to judge
    with pytest.raises(
        DataError, match=r"2 of 99 rows could not be used \(2.0%\), the limit is 1.0%: see .*broken.tsv"
    ):
        tally.check()
    with pytest.raises(DataError, match="3 of 100 rows"):
        tally.add(batch_of(0, "a.png"))
    assert (tmp_path / "broken.tsv").read_text() == "a.png\tit is cut off\nb.png\tit is cut off\n"
    resumed = BrokenTally(tmp_path / "broken.tsv", limit_fraction=0.5)
    resumed.add(batch_of(3, "b.png", "c.png"))
    assert (resumed.seen, resumed.broken) == (5, 2)
    assert (tmp_path / "broken.tsv").read_text().count("\n") == 3


def test_tally_lets_exactly_the_limit_pass(tmp_path):
    tally = BrokenTally(tmp_path / "broken.tsv")
    tally.add(batch_of(198, "a", "b"))
    assert (tally.seen, tally.broken) == (200, 2)
