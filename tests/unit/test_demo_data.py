"""The demo's data set: split by concept without leaks, captions that are true, builds that repeat."""

from __future__ import annotations

import itertools
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from qformers.demo.assets import fetch_pictures
from qformers.demo.concepts import (
    SMALL_VENDORS,
    Concept,
    load_emoji,
    load_stamps,
    shows,
    split_concepts,
    variant_group,
    with_article,
)
from qformers.demo.config import DemoDataConfig
from qformers.demo.dataset import build_demo_dataset
from qformers.demo.qt_resources import read_resources
from qformers.errors import ConfigError, DataError

THINGS = [
    "poodle", "owl", "canoe", "tent", "apple", "unicorn", "hammer", "violin", "rocket", "tulip", "lemon",
    "zebra", "crab", "ladder", "piano", "kite", "anchor", "teapot", "mushroom", "camel", "bus", "taxi",
    "snail", "goose", "melon", "axe", "drum", "yak", "wolf", "moose",
]  # fmt: skip
PEOPLE = ["man running", "woman running", "person running", "dog", "dog face", "lady beetle"]
LABELS = [*THINGS, *PEOPLE]
CONFIG = DemoDataConfig(
    scenes=40,
    held_out_scenes=12,
    validation_scenes=4,
    held_out_concepts=8,
    validation_concepts=3,
    scene_objects=18,
    singles=1,
    image_px=96,
)


def colour_of(label: str) -> tuple[int, int, int]:
    """A saturated colour for each label, far from the colours of others."""
    value = LABELS.index(label)
    return (value % 4) * 80, (value // 4 % 4) * 80, (value // 16) * 110


def disc(path: Path, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((6, 4, 57, 43), fill=(*colour, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, lossless=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three emoji vendors and stamps, as their packages lay them out."""
    root = tmp_path_factory.mktemp("sources")
    words, index = [], []
    for number, label in enumerate(LABELS):
        code = f"1F{number:03X}"
        tags = ["ladybug", "insect"] if label == "lady beetle" else ["thing", f"{label[0]}-word"]
        words.append({"label": label, "hexcode": code, "tags": tags, "group": 3, "subgroup": 34 if number < 30 else 28})
        disc(root / "fluent" / f"{code.lower()}.webp", colour_of(label))
        for vendor in SMALL_VENDORS:
            disc(root / vendor / "img" / f"{code.lower()}.png", colour_of(label))
        index.append({"unified": code, "image": f"{code.lower()}.png"})
    words.append({"label": "flag: Chad", "hexcode": "1F999", "group": 9, "subgroup": 98})
    (root / "emojibase").mkdir()
    (root / "emojibase" / "data.json").write_text(json.dumps(words))
    for vendor in SMALL_VENDORS:
        (root / vendor / "emoji.json").write_text(json.dumps(index))
    for label in THINGS[:20]:
        for kind in ("animals", "animals/cartoon"):  # equal file names in two folders, as in the real package
            disc(root / "tuxpaint" / kind / f"{label}.png", colour_of(label))
            (root / "tuxpaint" / kind / f"{label}.txt").write_text(f"{with_article(label).capitalize()}.\nde=…\n")
    return {name: root / name for name in ("emojibase", "fluent", *SMALL_VENDORS, "tuxpaint")}


@pytest.fixture(scope="module")
def built(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_dataset(folders, tmp_path_factory.mktemp("data") / "demo", CONFIG).folder


def read(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_counts_are_exact_and_every_picture_exists_once(built: Path) -> None:
    summary = json.loads((built / "dataset.json").read_text())
    splits = {name: read(built, name) for name in summary["counts"] if (built / f"{name}.jsonl").exists()}
    assert [len(splits[name]) for name in splits] == [summary["counts"][name] for name in splits]
    assert len(splits["held_out_concepts"]) == 8 and len(splits["validation_concepts"]) == 3
    assert len(splits["held_out_scenes"]) == 12 and len(splits["validation_scenes"]) == 4
    ids = [record["image_id"] for records in splits.values() for record in records]
    assert len(set(ids)) == len(ids) == len(list((built / "images").iterdir()))
    for record in itertools.chain(*splits.values()):
        with Image.open(built / record["image"]) as image:
            assert image.size == (96, 96) and image.mode == "RGB"
    assert summary["settings"]["seed"] == 0 and set(summary["licences"]) == {
        "emojibase",
        "fluent",
        "google",
        "twitter",
        "tuxpaint",
    }


def test_nothing_of_a_held_out_concept_is_trained_on(built: Path) -> None:
    train = read(built, "train")
    trained_words = " ".join(caption for record in train for caption in record["captions"]).lower()
    for record in read(built, "held_out_concepts") + read(built, "validation_concepts"):
        label, code = record["concept"], record["image_id"].split("-")[-1]
        assert record["captions"] == [label] and record["source"] == "fluent"
        assert not re.search(rf"\b{label}\b", trained_words), f"{label} is named in training"
        assert not [other for other in train if code in other["image_id"] or label in other["image_id"]]
        kin = [name for name in LABELS if name != label and variant_group(name) == variant_group(label)]
        assert not {other["concept"] for other in train} & set(kin), f"a variant of {label} is trained on"


def test_pictures_of_one_concept_share_a_group_and_scenes_do_not(built: Path) -> None:
    """Training reads `group` as the image id: captions of one concept are no negatives of its other pictures."""
    groups: dict[str, set[str]] = {}
    for record in read(built, "train"):
        groups.setdefault(record["image_id" if record["kind"] == "scene" else "concept"], set()).add(record["group"])
    assert all(len(of_concept) == 1 for of_concept in groups.values())
    assert len(set.union(*groups.values())) == len(groups)
    concepts = [record["concept"] for record in read(built, "train") if record["kind"] != "scene"]
    assert len(concepts) > len(set(concepts)), "no concept has two pictures: nothing was tested"


@pytest.mark.parametrize("seed", range(6))
def test_split_takes_whole_groups_and_all_vendors(folders: dict[str, Path], seed: int) -> None:
    emoji, stamps = load_emoji(folders), load_stamps(folders)
    assert len(emoji) == len(LABELS) and len(stamps) == 40 and {len(e.pictures) for e in emoji} == {3}
    split = split_concepts(emoji, stamps, 10, 4, np.random.default_rng(seed))
    assert (len(split.held_out), len(split.validation)) == (10, 4)
    sides = [{c.group for c in side if c.group} for side in (split.train, split.held_out, split.validation)]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(sides, 2))
    assert len(split.train) + 14 + len(split.dropped) == len(emoji) + len(stamps)
    unseen = {c.label for c in (*split.held_out, *split.validation)}
    assert {c.noun for c in split.dropped} == unseen & set(THINGS[:20])


def test_held_out_pairs_never_meet_in_training_but_each_object_does(built: Path) -> None:
    def pairs(record: dict) -> set[frozenset[str]]:
        return {frozenset(two) for two in itertools.combinations([o["name"] for o in record["objects"]], 2)}

    scenes = [record for record in read(built, "train") if record["kind"] == "scene"]
    met = set().union(*map(pairs, scenes))
    objects = set().union(*met)
    assert len(scenes) == 40
    for split in ("held_out_scenes", "validation_scenes"):
        for record in read(built, split):
            assert pairs(record).isdisjoint(met) and set().union(*pairs(record)) <= objects
    held = read(built, "held_out_scenes")
    captions = [record["captions"][0] for record in held]
    assert len(set(captions)) == len(captions) and all(len(record["captions"]) == 1 for record in held)
    twins = [(a, b) for a, b in itertools.combinations(held, 2) if pairs(a) == pairs(b)]
    assert twins and all(a["objects"] != b["objects"] for a, b in twins)


def test_spatial_captions_are_true_of_the_pixels(built: Path) -> None:
    checked = 0
    for record in read(built, "train") + read(built, "train_scenes_in_order") + read(built, "held_out_scenes"):
        places = {}
        for placed in record["objects"]:
            left, top, right, bottom = placed["box"]
            middle = (left + right) // 2, (top + bottom) // 2
            with Image.open(built / record["image"]) as image:
                pixel = image.getpixel(middle)
            if placed["name"] in LABELS:
                assert np.abs(np.subtract(pixel, colour_of(placed["name"]))).max() < 40, record
            places[placed["name"]] = middle
        for caption in record["captions"]:
            said = re.match(r"an? (\w+) (to the left of|to the right of|above|below) an? (\w+)", caption)
            if said:
                (ax, ay), (bx, by) = places[said[1]], places[said[3]]
                truth = {
                    "to the left of": ax < bx,
                    "to the right of": ax > bx,
                    "above": ay < by,
                    "below": ay > by,
                }
                assert truth[said[2]], (record["image_id"], caption)
                checked += 1
    assert checked > 100


def test_same_bytes_with_any_number_of_workers_and_other_bytes_with_another_seed(
    built: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    again = build_demo_dataset(folders, tmp_path / "again", DemoDataConfig(**{**vars(CONFIG), "workers": 1})).folder
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((built / name).read_bytes() == (again / name).read_bytes() for name in files)
    emoji, stamps = load_emoji(folders), load_stamps(folders)
    drawn = [split_concepts(emoji, stamps, 10, 4, np.random.default_rng(seed)).held_out for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_a_finished_build_is_reused_and_nothing_else_is_overwritten(
    built: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = (built / "dataset.json").stat().st_mtime_ns
    assert build_demo_dataset(folders, built, CONFIG).counts["held_out_scenes"] == 12
    assert (built / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="seed=0, not 1"):
        build_demo_dataset(folders, built, DemoDataConfig(**{**vars(CONFIG), "seed": 1}))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no finished data set"):
        build_demo_dataset(folders, tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_too_little_to_build_from_is_one_clear_error(folders: dict[str, Path], tmp_path: Path) -> None:
    for settings, reason in (
        ({"held_out_concepts": 248}, f"248 held-out and 3 validation concepts leave none of {len(LABELS)}"),
        ({"held_out_scenes": 5000}, "5004 evaluation scenes need more pairs"),
    ):
        with pytest.raises(ConfigError, match=reason):
            build_demo_dataset(folders, tmp_path / "out", DemoDataConfig(**{**vars(CONFIG), **settings}))
    with pytest.raises(DataError, match="holds pictures with words"):
        build_demo_dataset({"fluent": folders["fluent"]}, tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == [], "a failed build leaves something behind"


def test_scenes_are_made_of_so_many_objects(built: Path) -> None:
    records = [record for name in ("train", "held_out_scenes", "validation_scenes") for record in read(built, name)]
    things = {thing["name"] for record in records if record["kind"] == "scene" for thing in record["objects"]}
    assert len(things) == CONFIG.scene_objects


def test_things_and_scenes_are_the_training_records_in_their_order(built: Path) -> None:
    things, scenes = read(built, "train_things"), read(built, "train_scenes")
    assert read(built, "train") == things + scenes
    assert {record["kind"] for record in scenes} == {"scene"} and len(scenes) == CONFIG.scenes
    in_order = read(built, "train_scenes_in_order")
    assert [record | {"captions": []} for record in in_order] == [record | {"captions": []} for record in scenes]
    assert {record["kind"] for record in things} == {"concept", "single"}


def test_in_the_twin_of_a_scene_every_relation_is_the_other_way_round(built: Path) -> None:
    scenes = [record for record in read(built, "train") if record["kind"] == "scene"]
    twins: dict[str, list[dict]] = {}
    for record in scenes:
        twins.setdefault(record["together"], []).append(record)
    pairs = [records for records in twins.values() if len(records) == 2]
    assert len(pairs) >= 10 and len(pairs) + len(twins) == len(scenes)
    relations = ("to the left of", "to the right of", "above", "below")
    for first, second in pairs:
        assert first["group"] != second["group"]  # so each is a wrong picture for the other's captions
        boxes, turned = ([thing["box"] for thing in record["objects"]] for record in (first, second))
        side = CONFIG.image_px
        assert turned == [[side - right, side - bottom, side - left, side - top] for left, top, right, bottom in boxes]
        names = [with_article(thing["name"]) for thing in first["objects"]]
        for relation in relations:
            claim = f"{names[0]} {relation} {names[1]}"
            assert not (claim in first["captions"] and claim in second["captions"])
        # ITC and ITM take the twin for a wrong picture: a caption of the things alone would be true of it as well.
        for caption in first["captions"] + second["captions"]:
            assert any(f" {relation} " in caption for relation in relations), caption


def test_captions_in_order_name_things_from_left_to_right_or_from_top_to_bottom(built: Path) -> None:
    for record, both_ways in zip(read(built, "train_scenes_in_order"), read(built, "train_scenes"), strict=True):
        said = " ".join(record["captions"])
        assert " to the left of " in said or " above " in said, record["image_id"]
        assert " to the right of " not in said and " below " not in said, record["image_id"]
        if len(record["objects"]) == 2:
            assert len(set(record["captions"])) == len(record["captions"]) >= 2
            assert set(record["captions"][: len(record["captions"]) // 2]) <= set(both_ways["captions"])


def test_another_view_of_a_concept_is_moved_and_smaller_or_tilted(built: Path) -> None:
    records = {record["image_id"]: record for record in read(built, "train") if record["kind"] == "concept"}
    twins = [(records[name.removesuffix("-view1")], records[name]) for name in records if name.endswith("-view1")]
    assert 2 * len(twins) == len(records)
    for first, second in twins:
        its_own = dict.fromkeys(("image", "image_id", "together"), "")
        assert {**first, **its_own} == {**second, **its_own}
        boxes = []
        for record in (first, second):
            with Image.open(built / record["image"]) as image:
                ink = ImageChops.invert(image).convert("L").point(lambda value: 255 * (value > 16))
            boxes.append(ink.getbbox())
        assert boxes[0] != boxes[1]
        assert all(box is not None and 0 <= box[0] < box[2] <= 96 and 0 <= box[1] < box[3] <= 96 for box in boxes)


def test_stamps_alone_are_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    data = build_demo_dataset({"tuxpaint": folders["tuxpaint"]}, tmp_path / "out", CONFIG)
    assert data.counts["train_concept_pictures"] == 2 * 40 and data.counts["held_out_concepts"] == 0
    assert data.counts["held_out_scenes"] == 12


def test_stamps_that_show_a_held_out_emoji_are_found_by_their_words() -> None:
    def stamp(words: str, name: str) -> Concept:
        return Concept("stamp", words, (), (), "", name, tuple(words.split()), (name,))

    def emoji(label: str, *tags: str) -> Concept:
        return Concept(label, label, tags, (), label, label, tuple(label.split()))

    cases = [
        (stamp("poodle a big poodle", "poodle"), emoji("poodle"), True),
        (stamp("apple fuji", "fuji apple"), emoji("red apple"), True),
        (stamp("mountaingoat", "mountaingoat"), emoji("goat"), True),
        (stamp("ladybug", "ladybug"), emoji("lady beetle", "ladybug"), True),
        (stamp("bee", "bee"), emoji("honeybee", "bee"), True),
        (stamp("firetruck", "fire truck"), emoji("fire engine", "truck"), True),
        (stamp("poodle a dog", "dog"), emoji("poodle"), True),  # the file name gives it away
        (stamp("dog", "dog"), emoji("hot dog"), False),  # "dog" is the label of a training emoji
        (stamp("toy box", "toy box"), emoji("ox"), False),
        (stamp("canoe", "canoe"), emoji("poodle", "dog"), False),
    ]
    for other, held_out, expected in cases:
        assert shows(other, held_out, {"dog", "canoe"}) is expected, (other.label, held_out.label)


def test_variants_share_a_group_and_articles_are_english() -> None:
    groups = (
        ("man running", "woman running", "person running"), ("merman", "mermaid", "merperson"),
        ("person: beard", "man: beard"), ("cat", "cat face"), ("taxi", "oncoming taxi"),
        ("old man", "older person"), ("kiss: man, man", "kiss"), ("Santa Claus", "Mrs. Claus", "Mx Claus"),
    )  # fmt: skip
    names = [{variant_group(label) for label in labels} for labels in groups]
    assert [len(found) for found in names] == [1] * len(groups) and len(set().union(*names)) == len(groups)
    assert variant_group("kiss mark") != variant_group("kiss")
    nouns = ["owl", "unicorn", "ewe", "umbrella", "hourglass", "house", "one-piece swimsuit", "x-ray"]
    articles = ["an", "a", "a", "an", "an", "a", "a", "an"]
    assert [with_article(noun) for noun in nouns] == [f"{a} {n}" for a, n in zip(articles, nouns, strict=True)]


def test_qt_archives_are_read_and_damage_is_named(tmp_path: Path) -> None:
    def name(text: str) -> bytes:
        return struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")

    names = name("pictures") + name("sea.webp")
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHIIQ", 0, 2, 1, 2, 0)
    tree += struct.pack(">IHHHIQ", len(name("pictures")), 0, 0, 0, 0, 0)
    content = struct.pack(">I", 5) + b"water"
    header = struct.pack(">4s4I", b"qres", 2, 20, 20 + len(tree), 20 + len(tree) + len(content))
    archive = tmp_path / "a.rcc"
    archive.write_bytes(header + tree + content + names)
    assert read_resources(archive, (".webp",)) == {"/pictures/sea.webp": b"water"}
    for damaged in (b"PK" + header, (header + tree + content + names)[:-6], header + tree[:30]):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.rcc"):
            read_resources(archive, (".webp",))


@pytest.mark.assets
@pytest.mark.parametrize("seed", range(3))
def test_no_real_stamp_that_names_a_held_out_emoji_is_trained_on(seed: int) -> None:
    folders, _ = fetch_pictures()
    emoji, stamps = load_emoji(folders), load_stamps(folders)
    assert len(emoji) > 1390 and len(stamps) > 700
    split = split_concepts(emoji, stamps, 248, 80, np.random.default_rng(seed))
    unseen = {concept.label.lower() for concept in (*split.held_out, *split.validation)}
    assert len(unseen) == 328
    for stamp in split.train:
        if not stamp.group:
            caption = stamp.label.lower().rstrip(".!").removeprefix("a ").removeprefix("an ")
            stem = stamp.pictures[0].path.stem.lower()
            assert not {caption, stem, *stem.split("_")} & unseen, stamp
