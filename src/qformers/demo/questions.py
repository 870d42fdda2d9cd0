"""Questions whose answers are known: easy-VQA from its package, and scenes made for questions of every kind.

    train.jsonl, test.jsonl      {image, image_id, question, question_id, answers, answer_type}
    <part>_captions.jsonl        {image, image_id, captions}, of scenes: a caption of each thing
    images/…                     of scenes; easy-VQA's stay where they were unpacked

A scene has four cells, each with a thing on a card of some colour. One thing stands in one, two or three of them, the
others are different. Which things, which cells, which colours and how often are drawn evenly and without regard to each
other, so what is asked says nothing about what is to be answered:

| answer_type | question | answers |
|---|---|---|
| colour | what colour is behind the poodle? | the colours of the cards |
| where | where is the poodle? | top left, top right, bottom left, bottom right |
| what | what is in the top left? | the things |
| how many | how many times is there a poodle? | 1, 2, 3 |
| yes/no | is there a poodle? | yes, no |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformers.demo.assets import atomic_folder, fetch
from qformers.demo.concepts import Concept, load_emoji, load_stamps, with_article
from qformers.demo.config import SceneQuestionsConfig
from qformers.demo.scenes import Background, Cutout, Placed, Scene, draw_scene, load_backgrounds, measure_cutout
from qformers.errors import ConfigError, DataError

COLOURS = {
    "red": (205, 40, 40), "green": (45, 150, 60), "blue": (45, 85, 205), "yellow": (240, 210, 60),
    "black": (25, 25, 25), "white": (250, 250, 250),
}  # fmt: skip
CELLS = ("top left", "top right", "bottom left", "bottom right")
ONE_THING = ("colour", "where", "what")
KINDS = (*ONE_THING, "how many", "yes/no")


@dataclass(frozen=True)
class Thing:
    """What stands in a cell."""

    name: str
    cell: int
    colour: str


def write_easy_vqa(output: Path) -> dict[str, int]:
    """easy-VQA's questions as JSONL over the package's own pictures; the number of questions of each part.

    The questions about the last tenth of its training pictures are held apart, as `validation`, to choose settings by.

    Raises:
        DataError: the package cannot be had, or `output` is there already.
    """
    source = fetch("easy-vqa")
    _refuse_existing(output)
    counts = {}
    with atomic_folder(output) as folder:
        for part in ("train", "test"):
            rows = json.loads((source / part / "questions.json").read_text(encoding="utf-8"))
            pictures = 1 + max(image for _, _, image in rows)
            records: dict[str, list[dict[str, object]]] = {}
            for number, (question, answer, image) in enumerate(rows):
                name = "validation" if part == "train" and image >= pictures - pictures // 10 else part
                record = {
                    "image": str(source / part / "images" / f"{image}.png"),
                    "image_id": f"{part}-{image}",
                    "question": question,
                    "question_id": str(number),
                    "answers": [answer],
                    "answer_type": _easy_kind(question, answer),
                }
                records.setdefault(name, []).append(record)
            counts |= {name: _write(folder / f"{name}.jsonl", some) for name, some in records.items()}
    return counts


def _easy_kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "colour" if "color" in question else "shape"


def write_scene_questions(folders: dict[str, Path], output: Path, config: SceneQuestionsConfig) -> dict[str, int]:
    """Scenes and their questions; the number of questions of each part.

    Args:
        folders: the unpacked sources by their names in `assets.ASSETS`.

    Raises:
        ConfigError: fewer things with cut-outs than asked for. DataError: `output` is there already.
    """
    _refuse_existing(output)
    rng = np.random.default_rng(config.seed)
    cutouts = _things([*load_emoji(folders), *load_stamps(folders)], config.things, rng)
    grounds = load_backgrounds(None, config.image_px)
    counts = {}
    with atomic_folder(output) as folder:
        (folder / "images").mkdir()
        for part, scenes in (("train", config.scenes), ("test", config.test_scenes)):
            records, captions = [], []
            for number in range(scenes):
                image_id = f"{part}-{number:05d}"
                things = draw_things(sorted(cutouts), rng)
                scene = _scene(image_id, things, cutouts, grounds, config.image_px, rng)
                image = draw_scene(scene, grounds, config.image_px)
                image.save(folder / "images" / f"{image_id}.jpg", quality=92, subsampling=0)
                picture = {"image": f"images/{image_id}.jpg", "image_id": image_id}
                captions.append(picture | {"captions": thing_captions(things)})
                for kind, question, answer in ask_of(things, sorted(cutouts), rng):
                    records.append(
                        {
                            **picture,
                            "question": question,
                            "question_id": f"{image_id}-{kind.replace(' ', '-').replace('/', '-')}",
                            "answers": [answer],
                            "answer_type": kind,
                        }
                    )
            counts[part] = _write(folder / f"{part}.jsonl", records)
            _write(folder / f"{part}_captions.jsonl", captions)
    return counts


def draw_things(names: list[str], rng: np.random.Generator) -> list[Thing]:
    """What stands in the four cells: the first name one, two or three times, the others once each."""
    times = int(rng.integers(1, 4))
    chosen = [names[index] for index in rng.permutation(len(names))[: 5 - times]]
    cells, colours = rng.permutation(len(CELLS)), rng.integers(len(COLOURS), size=len(CELLS))
    standing = [chosen[0]] * times + chosen[1:]
    palette = list(COLOURS)
    return [
        Thing(name, int(cell), palette[colour]) for name, cell, colour in zip(standing, cells, colours, strict=True)
    ]


def thing_captions(things: list[Thing]) -> list[str]:
    """A caption of each thing, "poodle on red top left": all that can be asked, one thing at a time."""
    return [f"{thing.name} on {thing.colour} {CELLS[thing.cell]}" for thing in things]


def asked_caption(question: str, captions: list[str]) -> str:
    """Of `thing_captions` the one that answers a question about one thing (`ONE_THING`)."""
    for caption in captions:
        name, place = caption.rsplit(" on ", 1)
        cell = place.split(" ", 1)[1]
        if question.endswith((f" the {name}?", f" the {cell}?")):
            return caption
    raise ValueError(f"{question!r} is about none of {captions}")


def ask_of(things: list[Thing], names: list[str], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(kind, question, answer), one of each kind.

    Colour and place are asked of a thing that stands there once, the number of the one that may stand there more often.
    """
    repeated = [thing for thing in things if thing.name == things[0].name]
    once = [thing for thing in things if thing not in repeated or len(repeated) == 1]
    of_colour, of_place = (once[int(rng.integers(len(once)))] for _ in range(2))
    shown = things[int(rng.integers(len(things)))]
    absent = sorted(set(names) - {thing.name for thing in things})
    present = sorted({thing.name for thing in things})
    is_there = bool(rng.integers(2))
    sought = present if is_there else absent
    name = sought[int(rng.integers(len(sought)))]
    return [
        ("colour", f"what colour is behind the {of_colour.name}?", of_colour.colour),
        ("where", f"where is the {of_place.name}?", CELLS[of_place.cell]),
        ("what", f"what is in the {CELLS[shown.cell]}?", shown.name),
        ("how many", f"how many times is there {with_article(repeated[0].name)}?", str(len(repeated))),
        ("yes/no", f"is there {with_article(name)}?", "yes" if is_there else "no"),
    ]


def _things(concepts: Iterable[Concept], count: int, rng: np.random.Generator) -> dict[str, list[Cutout]]:
    """The cut-outs of some things, evenly drawn from all that have a noun and one."""
    found: dict[str, list[Cutout]] = {}
    for concept in concepts:
        for picture in concept.pictures if concept.noun else ():
            if cutout := measure_cutout(picture.path, picture.source):
                found.setdefault(str(concept.noun), []).append(cutout)
    if len(found) < max(count, 5):
        raise ConfigError(f"{count} things are asked for and {len(found)} have cut-outs; at least 5 are needed")
    names = sorted(found)
    return {names[index]: found[names[index]] for index in rng.permutation(len(names))[:count]}


def _scene(
    image_id: str,
    things: list[Thing],
    cutouts: dict[str, list[Cutout]],
    grounds: dict[str, Background],
    image_px: int,
    rng: np.random.Generator,
) -> Scene:
    """The plan of a picture: in each cell a card, and on it the thing, as large as it fits."""
    half, margin, edge = image_px // 2, image_px // 24, image_px // 20
    placed = []
    for thing in things:
        left, top = half * (thing.cell % 2) + margin, half * (thing.cell // 2) + margin
        card = (left, top, left + half - 2 * margin, top + half - 2 * margin)
        options = cutouts[thing.name]
        cutout = options[int(rng.integers(len(options)))]
        width, height = cutout.size(half - 2 * margin - 2 * edge)
        x, y = (card[0] + card[2] - width) // 2, (card[1] + card[3] - height) // 2
        placed.append(Placed(thing.name, cutout, (x, y, x + width, y + height), card, COLOURS[thing.colour]))
    names = sorted(grounds)
    ground = names[int(rng.integers(len(names)))]
    return Scene(image_id, ground, (float(rng.random()), float(rng.random())), False, tuple(placed), ())


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise DataError(f"{output} is there already: choose another folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)


def _write(path: Path, records: list[dict[str, object]]) -> int:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return len(records)
