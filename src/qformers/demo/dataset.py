"""Builds the demo's data set: pictures and JSONL files in the format that users bring themselves.

    images/…                     JPEG, `image_px` × `image_px`
    train.jsonl                  every kind of training record (`kind`: "concept", "single" or "scene")
    train_things.jsonl           of them, pictures of one thing
    train_scenes.jsonl           of them, scenes; both follow train.jsonl's order, one after the other
    train_scenes_in_order.jsonl  the same scenes, but captions name things from left to right or from top to bottom
    validation_concepts.jsonl    emoji not trained on, to choose settings such as a baseline's penalty
    validation_scenes.jsonl      pairs of objects that never occur together in training, for the same purpose
    held_out_concepts.jsonl      one picture and one caption (the label) for each held-out emoji
    held_out_scenes.jsonl        one picture and one exact spatial caption for each, of unseen pairs
    dataset.json                 settings, counts, sources, licences

Captions speak of left and right, so horizontal flips must be off in training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qformers.demo.assets import atomic_folder
from qformers.demo.concepts import (
    Concept,
    Picture,
    Split,
    emoji_captions,
    fresh_tags,
    load_emoji,
    load_stamps,
    split_concepts,
    with_article,
)
from qformers.demo.config import DemoDataConfig
from qformers.demo.packages import ASSETS
from qformers.demo.scenes import (
    Background,
    Cutout,
    Placed,
    Scene,
    draw_pairs,
    draw_scene,
    load_backgrounds,
    measure_cutout,
    place,
    plan_scenes,
    plan_unseen_pairs,
)
from qformers.errors import ConfigError, DataError

FORMAT_VERSION = 6  # raise when the same settings come to mean other pictures or words
SPLITS = ("train", "validation_concepts", "validation_scenes", "held_out_concepts", "held_out_scenes")
TRAIN_PARTS = ("train_things", "train_scenes", "train_scenes_in_order")


@dataclass(frozen=True)
class Pose:
    """How a picture lies on its white square: its size (1 fills the square), its tilt, its place in the room left."""

    size: float = 1.0
    degrees: float = 0.0
    across: float = 0.5
    down: float = 0.5


@dataclass(frozen=True)
class DemoData:
    """A finished build: its folder and the number of records of each kind."""

    folder: Path
    counts: dict[str, int]

    def records(self, split: str) -> Path:
        """The JSONL file of one of `SPLITS` or `TRAIN_PARTS`."""
        return self.folder / f"{split}.jsonl"


def build_demo_dataset(folders: dict[str, Path], output: Path, config: DemoDataConfig) -> DemoData:
    """Writes the data set into `output`, or returns the one that is there when it has the same settings.

    `folders` are the unpacked sources by their names in `assets.ASSETS`; at least one with words is needed.
    The same sources and settings give the same bytes with any number of workers. Raises DataError when
    `output` holds anything else, and ConfigError when the sources are too few for what is asked.
    """
    settings = {key: value for key, value in asdict(config).items() if key != "workers"}
    settings |= {"format_version": FORMAT_VERSION, "sources": sorted(folders)}
    if output.exists() and any(output.iterdir()):
        return _reuse(output, settings)
    rng = np.random.default_rng(config.seed)
    emoji, stamps = load_emoji(folders), load_stamps(folders)
    if not emoji and not stamps:
        raise DataError(f"none of {sorted(folders)} holds pictures with words: give emoji with their words, or stamps")
    held_out, validation = (config.held_out_concepts, config.validation_concepts) if emoji else (0, 0)
    split = split_concepts(emoji, stamps, held_out, validation, rng)
    grounds = load_backgrounds(folders.get("gcompris"), config.image_px)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rmdir()
    # Spawned workers hold no copy of threads and locks that the calling program may have.
    workers = ProcessPoolExecutor(config.workers, get_context("spawn"))
    with atomic_folder(output) as building, workers as pool:
        (building / "images").mkdir()
        records = _write_all(split, grounds, building, config, pool, rng)
        counts = _counts(records, split)
        licences = {name: ASSETS[name].licence for name in sorted(folders)}
        summary = {"settings": settings, "counts": counts, "licences": licences}
        (building / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return DemoData(output, counts)


def _reuse(output: Path, settings: dict[str, Any]) -> DemoData:
    summary_file = output / "dataset.json"
    if not summary_file.exists():
        raise DataError(f"{output} is not empty and holds no finished data set: choose another folder or empty it")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    found = summary["settings"]
    for key, value in settings.items():
        if found.get(key) != value:
            raise DataError(f"{output} was built with {key}={found.get(key)}, not {value}: choose another folder")
    return DemoData(output, summary["counts"])


def _write_all(
    split: Split,
    grounds: dict[str, Background],
    folder: Path,
    config: DemoDataConfig,
    pool: ProcessPoolExecutor,
    rng: np.random.Generator,
) -> dict[str, list[dict[str, Any]]]:
    """Draws every picture and writes every JSONL file; returns the records by split."""
    train, pictures = _concept_records(split.train, config.concept_views, rng)
    records = {"train": train}
    for name, concepts in (("held_out_concepts", split.held_out), ("validation_concepts", split.validation)):
        records[name], more = _evaluation_records(concepts)
        pictures += more
    list(pool.map(partial(_write_picture, folder=folder, image_px=config.image_px), pictures, chunksize=32))
    cutouts = _measure(split.train, pool)
    scenes = {"train": _plan_singles(split.train, cutouts, grounds, config, rng)}
    nouns: dict[str, list[Cutout]] = {}
    for concept in split.train:
        found = [cutouts[picture] for picture in concept.pictures if picture in cutouts]
        if concept.noun and found:
            nouns.setdefault(concept.noun, []).extend(found)
    if config.scenes or config.held_out_scenes or config.validation_scenes:
        for name, planned in _plan_pairs(nouns, grounds, config, rng).items():
            scenes.setdefault(name, []).extend(planned)
    drawn = [scene for planned in scenes.values() for scene in planned]
    by_ground = sorted(drawn, key=lambda scene: scene.background)
    chunks = [by_ground[start : start + 64] for start in range(0, len(by_ground), 64)]
    jobs = [(chunk, {scene.background: grounds[scene.background] for scene in chunk}) for chunk in chunks]
    list(pool.map(partial(_write_scenes, folder=folder, image_px=config.image_px), jobs))
    for name, planned in scenes.items():
        records.setdefault(name, []).extend(_scene_record(scene) for scene in planned)
    records["train_things"] = [record for record in records["train"] if record["kind"] != "scene"]
    records["train_scenes"] = [record for record in records["train"] if record["kind"] == "scene"]
    in_order = {scene.image_id: list(scene.in_order) for scene in drawn}
    records["train_scenes_in_order"] = [
        record | {"captions": in_order[record["image_id"]]} for record in records["train_scenes"]
    ]
    for name in (*SPLITS, *TRAIN_PARTS):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records.setdefault(name, []))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return records


def _concept_records(
    concepts: Iterable[Concept], views: int, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], list[tuple[Picture, Pose, str]]]:
    """`views` records for each picture of each concept, and which picture goes into which file, how."""
    records, pictures = [], []
    for concept in concepts:
        captions = emoji_captions(concept, rng) if concept.group else _stamp_captions(concept)
        for picture in concept.pictures:
            for view in range(views):
                image_id = f"{picture.source}-{concept.key}" + (f"-view{view}" if view else "")
                records.append(_record(image_id, captions, "concept", concept.label, picture.source))
                pictures.append((picture, _random_pose(rng) if view else Pose(), image_id))
    return records, pictures


def _random_pose(rng: np.random.Generator) -> Pose:
    return Pose(rng.uniform(0.6, 1.0), rng.uniform(-15, 15), float(rng.random()), float(rng.random()))


def _stamp_captions(concept: Concept) -> list[str]:
    return [concept.label, with_article(concept.noun)] if concept.noun else [concept.label]


def _evaluation_records(
    concepts: Iterable[Concept],
) -> tuple[list[dict[str, Any]], list[tuple[Picture, Pose, str]]]:
    """The first vendor's picture of each concept with its label as the only caption."""
    records, pictures = [], []
    for concept in concepts:
        picture = concept.pictures[0]
        image_id = f"{picture.source}-{concept.key}"
        records.append(_record(image_id, [concept.label], "concept", concept.label, picture.source))
        pictures.append((picture, Pose(), image_id))
    return records, pictures


def _record(image_id: str, captions: list[str], kind: str, concept: str, source: str) -> dict[str, Any]:
    """`group` says whose captions fit this picture too: all pictures of a concept share it, a scene has its own.
    `together` is shared by pictures that training may show side by side: a scene and its twin."""
    return {
        "image": f"images/{image_id}.jpg",
        "captions": captions,
        "image_id": image_id,
        "group": image_id if kind == "scene" else concept,
        "together": image_id,
        "kind": kind,
        "concept": concept,
        "source": source,
        "objects": [],
    }


def _scene_record(scene: Scene) -> dict[str, Any]:
    kind = "scene" if len(scene.objects) > 1 else "single"
    source = "+".join(sorted({placed.cutout.source for placed in scene.objects}))
    names = ", ".join(placed.name for placed in scene.objects)
    record = _record(scene.image_id, list(scene.captions), kind, names, source)
    record["objects"] = [{"name": placed.name, "box": list(placed.box)} for placed in scene.objects]
    return record | {"background": scene.background, "together": scene.twin_of or scene.image_id}


def _measure(concepts: Iterable[Concept], pool: ProcessPoolExecutor) -> dict[Picture, Cutout]:
    pictures = sorted({picture for concept in concepts for picture in concept.pictures}, key=lambda p: str(p.path))
    measured = pool.map(measure_cutout, [p.path for p in pictures], [p.source for p in pictures], chunksize=64)
    return {picture: cutout for picture, cutout in zip(pictures, measured, strict=True) if cutout}


def _plan_singles(
    concepts: Iterable[Concept],
    cutouts: dict[Picture, Cutout],
    grounds: dict[str, Background],
    config: DemoDataConfig,
    rng: np.random.Generator,
) -> list[Scene]:
    """`config.singles` pictures of each concept that has a cut-out, alone on a random ground."""
    planned = []
    ground_names = sorted(grounds)
    for concept in concepts:
        found = [cutouts[picture] for picture in concept.pictures if picture in cutouts]
        for number in range(config.singles if found else 0):
            cutout = found[number % len(found)]
            ground = ground_names[int(rng.integers(len(ground_names)))]
            box = place([cutout], config.image_px, (0.35, 0.7), rng)[0]
            name = concept.noun or concept.label
            words = with_article(name) if concept.noun else name.rstrip(".!")
            captions = [words, f"{words} {grounds[ground].phrase}"]
            if fresh := fresh_tags(concept):
                captions.append(f"{concept.label}, {fresh[int(rng.integers(len(fresh)))]}")
            placed = Placed(name, cutout, box)
            origin, flip = (float(rng.random()), float(rng.random())), bool(rng.integers(2))
            image_id = f"single-{concept.key}-{number}"
            planned.append(Scene(image_id, ground, origin, flip, (placed,), tuple(captions)))
    return planned


def _plan_pairs(
    nouns: dict[str, list[Cutout]],
    grounds: dict[str, Background],
    config: DemoDataConfig,
    rng: np.random.Generator,
) -> dict[str, list[Scene]]:
    """Training scenes, and evaluation scenes of trained objects in pairs that no training scene shows."""
    names = sorted(nouns)
    pool = [names[index] for index in rng.permutation(len(names))[: config.scene_objects]]
    wanted = config.held_out_scenes + config.validation_scenes
    pairs = draw_pairs(pool, wanted, rng)
    if len(pairs) < wanted or len(pool) * (len(pool) - 1) // 2 < 2 * wanted:
        raise ConfigError(
            f"{wanted} evaluation scenes need more pairs than {len(pool)} objects give: ask for fewer, or more objects"
        )
    used = {name: nouns[name] for name in pool}
    forbidden = {frozenset(pair) for pair in pairs}
    held, checked = pairs[: config.held_out_scenes], pairs[config.held_out_scenes :]
    train = plan_scenes(used, grounds, config.scenes, config.image_px, forbidden, rng)
    return {
        "train": train,
        "held_out_scenes": plan_unseen_pairs(
            held, used, grounds, config.held_out_scenes, config.image_px, "held-out-scene", rng
        ),
        "validation_scenes": plan_unseen_pairs(
            checked, used, grounds, config.validation_scenes, config.image_px, "validation-scene", rng
        ),
    }


def _write_picture(job: tuple[Picture, Pose, str], folder: Path, image_px: int) -> None:
    """A picture on white; a stamp, which has no margin of its own, gets one."""
    picture, pose, image_id = job
    with Image.open(picture.path) as image:
        rgba = image.convert("RGBA")
    if picture.source == "tuxpaint":
        rgba = rgba.crop(rgba.getchannel("A").getbbox())
    if pose.degrees:
        rgba = rgba.rotate(pose.degrees, Image.Resampling.BICUBIC, expand=True)
    scale = image_px / max(rgba.size) * (0.9 if picture.source == "tuxpaint" else 1) * pose.size
    rgba = rgba.resize([max(1, round(side * scale)) for side in rgba.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (image_px, image_px), "white")
    corner = round((image_px - rgba.width) * pose.across), round((image_px - rgba.height) * pose.down)
    canvas.paste(rgba, corner, rgba)
    _save(canvas, folder, image_id)


def _write_scenes(job: tuple[list[Scene], dict[str, Background]], folder: Path, image_px: int) -> None:
    scenes, grounds = job
    for scene in scenes:
        _save(draw_scene(scene, grounds, image_px), folder, scene.image_id)


def _save(image: Image.Image, folder: Path, image_id: str) -> None:
    image.save(folder / "images" / f"{image_id}.jpg", quality=92, subsampling=0)


def _counts(records: dict[str, list[dict[str, Any]]], split: Split) -> dict[str, int]:
    kinds = Counter(f"train_{record['kind']}_pictures" for record in records["train"])
    return {
        **{name: len(records[name]) for name in SPLITS},
        **dict(sorted(kinds.items())),
        "train_captions": sum(len(record["captions"]) for record in records["train"]),
        "train_concepts": len(split.train),
        "pictures_dropped_for_showing_a_held_out_concept": len(split.dropped),
    }
