"""Scenes composed of cut-outs on a background, with captions that are true by construction.

A scene is first planned (which objects, where, which words) and then drawn. Planning uses one random
generator, and drawing is a function of the plan alone, so a data set is the same whatever the number of
worker processes.

Boxes never overlap, so two objects are always apart along one axis at least. A relation is only claimed along
an axis on which the boxes are fully apart, and evaluation pairs are apart along one axis only: there the
mirrored caption is false and no second relation is true.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from qformers.demo.concepts import with_article
from qformers.demo.qt_resources import read_resources

CUTOUT_PX = 160  # longest side a cut-out is kept at; the largest it is ever pasted at
_INVERSE = {"to the left of": "to the right of", "above": "below"}
IN_ORDER = tuple(_INVERSE)  # what is said of things that are named from left to right, or from top to bottom
_INVERSE |= {inverse: relation for relation, inverse in _INVERSE.items()}

# Photographs that show none of the concepts, with the words for where a thing pasted on them is.
PHOTOGRAPHS = {
    "sea1": "under water", "sea2": "under water", "sea4": "under water", "sea5": "under water",
    "canyondeChelly": "in a canyon", "greatWallofChina": "in the hills", "machuPicchu": "in the mountains",
    "bentPyramid": "in the desert", "redPyramid": "in the desert", "meidumPyramid": "in the desert",
    "pontduGard": "in front of an aqueduct", "arlesAmphitheater": "in front of ruins",
    "colosseum": "in front of ruins", "navajo": "in front of a cliff", "ajantaCave": "in the hills",
    "fortSumter": "in front of ruins", "lincolnMemorial": "in front of columns",
}  # fmt: skip
# Plain grounds drawn by us: a word and the two colours a gradient runs between.
GRADIENTS = {
    "blue": ((150, 190, 250), (90, 130, 220)), "green": ((170, 225, 150), (90, 170, 90)),
    "yellow": ((255, 245, 170), (240, 215, 100)), "pink": ((255, 205, 220), (240, 150, 185)),
    "purple": ((205, 180, 240), (140, 105, 200)), "grey": ((215, 215, 215), (150, 150, 150)),
    "white": ((255, 255, 255), (238, 238, 238)), "orange": ((255, 215, 160), (245, 165, 80)),
    "brown": ((200, 170, 140), (140, 105, 75)),
}  # fmt: skip


@dataclass(frozen=True)
class Background:
    """A ground to paste on: a photograph (RGB, larger than a scene) or a gradient, and the words for it."""

    name: str
    phrase: str
    image: Image.Image


@dataclass(frozen=True)
class Cutout:
    """A picture with transparency. `crop` is its visible part in source pixels (left, top, right, bottom)."""

    path: Path
    source: str
    crop: tuple[int, int, int, int]

    def size(self, longest_px: int) -> tuple[int, int]:
        """Width and height in pixels when the longer side is `longest_px`."""
        width, height = self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]
        scale = longest_px / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class Placed:
    """One object of a scene; `box` is (left, top, right, bottom) in scene pixels, `card` a plain card's behind it."""

    name: str
    cutout: Cutout
    box: tuple[int, int, int, int]
    card: tuple[int, int, int, int] | None = None
    card_colour: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Scene:
    """A plan: everything needed to draw the picture, and its true captions. `twin_of` is the scene it mirrors.

    Of a training scene, `in_order` are those that name things from left to right or from top to bottom.
    """

    image_id: str
    background: str
    origin: tuple[float, float]
    mirrored_ground: bool
    objects: tuple[Placed, ...]
    captions: tuple[str, ...]
    in_order: tuple[str, ...] = ()
    twin_of: str | None = None

    @property
    def pairs(self) -> set[frozenset[str]]:
        """The unordered pairs of objects that appear together."""
        return {frozenset(pair) for pair in itertools.combinations([placed.name for placed in self.objects], 2)}


def load_backgrounds(folder: Path | None, image_px: int) -> dict[str, Background]:
    """The gradients, and those photographs of `folder` (Qt archives or files) that we have words for."""
    longest_px = image_px * 3 // 2
    grounds = {}
    for colour, (top, bottom) in GRADIENTS.items():
        steps = np.linspace(0, 1, longest_px)[:, None, None]
        rows = (1 - steps) * np.array(top) + steps * np.array(bottom)
        image = Image.fromarray(np.broadcast_to(rows, (longest_px, longest_px, 3)).astype(np.uint8))
        grounds[colour] = Background(colour, f"on {with_article(colour)} background", image)
    for name, image in sorted(_photographs(folder).items()) if folder else ():
        scale = longest_px / min(image.size)
        smaller = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        grounds[name] = Background(name, PHOTOGRAPHS[name], smaller)
    return grounds


def _photographs(folder: Path) -> dict[str, Image.Image]:
    found: dict[str, Image.Image] = {}
    for archive in sorted(folder.rglob("*.rcc")):
        if archive.stem in ("clickgame", "explore_monuments"):
            for name, content in read_resources(archive, (".webp",)).items():
                if (stem := Path(name).stem) in PHOTOGRAPHS:
                    found[stem] = Image.open(io.BytesIO(content)).convert("RGB")
    for path in sorted(folder.rglob("*.webp")):
        if path.stem in PHOTOGRAPHS:
            found.setdefault(path.stem, Image.open(path).convert("RGB"))
    return found


def measure_cutout(path: Path, source: str) -> Cutout | None:
    """The visible part of a picture, or None when it has no transparent surroundings to cut it out of."""
    with Image.open(path) as image:
        if "A" not in image.getbands() and "transparency" not in image.info:
            return None
        alpha = image.convert("RGBA").getchannel("A")
    visible = alpha.point([255 if value > 24 else 0 for value in range(256)])
    crop = visible.getbbox()
    if crop is None or min(crop[2] - crop[0], crop[3] - crop[1]) < 12:
        return None
    histogram = visible.histogram()
    return None if histogram[255] > 0.97 * alpha.width * alpha.height else Cutout(path, source, crop)


def place(
    cutouts: list[Cutout], image_px: int, fraction: tuple[float, float], rng: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """Boxes of random size and position that keep apart by at least 2 % of the image along one axis.

    `fraction` is the range of an object's longer side as a part of the image's; it shrinks until all fit.
    """
    gap = max(2, image_px // 50)
    for attempt in itertools.count():
        shrink = 0.97 ** (attempt // 10)
        boxes: list[tuple[int, int, int, int]] = []
        for cutout in cutouts:
            longest = min(CUTOUT_PX, image_px, max(8, int(rng.uniform(*fraction) * shrink * image_px)))
            width, height = cutout.size(longest)
            left = int(rng.integers(0, image_px - width + 1))
            top = int(rng.integers(0, image_px - height + 1))
            boxes.append((left, top, left + width, top + height))
        if all(_relations(a, b, gap) for a, b in itertools.combinations(boxes, 2)):
            return boxes
    raise AssertionError("unreachable: boxes shrink until they fit")


def _relations(a: tuple[int, ...], b: tuple[int, ...], gap: int = 0) -> list[str]:
    """What is true of box `a` with respect to box `b`."""
    found = []
    if a[2] + gap <= b[0]:
        found.append("to the left of")
    if b[2] + gap <= a[0]:
        found.append("to the right of")
    if a[3] + gap <= b[1]:
        found.append("above")
    if b[3] + gap <= a[1]:
        found.append("below")
    return found


def scene_captions(
    objects: list[Placed], phrase: str, rng: np.random.Generator
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """True captions, up to seven with relations in both directions and up to seven with those of `IN_ORDER` alone.

    Some name the ground, of three objects some all of them. Of two every caption says how they stand: what only names
    them is as true of the scene's twin, which training takes for a picture that the caption does not match.
    """
    names = [with_article(placed.name) for placed in objects]
    spatial = [
        (relation, f"{names[a]} {relation} {names[b]}")
        for a, b in itertools.permutations(range(len(objects)), 2)
        for relation in _relations(objects[a].box, objects[b].box)
    ]
    both_ways = [spatial[index][1] for index in rng.permutation(len(spatial))[:4]]
    in_order = [caption for relation, caption in spatial if relation in IN_ORDER][:4]
    together = []
    if len(objects) > 2:
        listed = [names[index] for index in rng.permutation(len(names))]
        together = [", ".join(listed[:-1]) + f" and {listed[-1]}"]

    def finished(chosen: list[str]) -> tuple[str, ...]:
        on_ground = chosen[:1] + (together or chosen[1:2])
        return (*chosen, *together, *(f"{caption} {phrase}" for caption in on_ground))

    return finished(both_ways), finished(in_order)


def plan_scenes(
    cutouts: dict[str, list[Cutout]],
    grounds: dict[str, Background],
    count: int,
    image_px: int,
    forbidden: set[frozenset[str]],
    rng: np.random.Generator,
) -> list[Scene]:
    """Training scenes of two or three objects: no pair of `forbidden` occurs, and every object does.

    A scene of two is followed by its twin: the same things and ground, each place turned about the middle, so that
    every relation is the other way round. Nothing but the relations tells the two apart.
    """
    names, ground_names = sorted(cutouts), sorted(grounds)
    scenes: list[Scene] = []
    deck: list[str] = []
    while len(scenes) < count:
        if not deck:
            deck = [names[index] for index in rng.permutation(len(names))]
        chosen = [deck.pop()]
        wanted = 2 if rng.random() < 0.6 else 3
        for _ in range(50):
            candidate = names[int(rng.integers(len(names)))]
            if len(chosen) < wanted and all(
                _distinct(candidate, name) and frozenset((candidate, name)) not in forbidden for name in chosen
            ):
                chosen.append(candidate)
        if len(chosen) < 2:
            continue
        parts = [cutouts[name][int(rng.integers(len(cutouts[name])))] for name in chosen]
        boxes = place(parts, image_px, (0.3, 0.55) if len(chosen) == 2 else (0.25, 0.42), rng)
        objects = [Placed(*row) for row in zip(chosen, parts, boxes, strict=True)]
        ground = ground_names[int(rng.integers(len(ground_names)))]
        captions, in_order = scene_captions(objects, grounds[ground].phrase, rng)
        origin, flip = (float(rng.random()), float(rng.random())), bool(rng.integers(2))
        image_id = f"scene-{len(scenes):06d}"
        scenes.append(Scene(image_id, ground, origin, flip, tuple(objects), captions, in_order))
        if len(objects) == 2 and len(scenes) < count:
            turned = [replace(placed, box=_turned(placed.box, image_px)) for placed in objects]
            captions, in_order = scene_captions(turned, grounds[ground].phrase, rng)
            twin = f"scene-{len(scenes):06d}"
            scenes.append(Scene(twin, ground, origin, flip, tuple(turned), captions, in_order, image_id))
    return scenes


def draw_pairs(names: list[str], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`count` different pairs of nouns that share no word ("dog" and "guide dog" may be one thing twice)."""
    pairs = [pair for pair in itertools.combinations(sorted(names), 2) if _distinct(*pair)]
    chosen = [pairs[index] for index in rng.permutation(len(pairs))[:count]]
    return [pair if rng.integers(2) else pair[::-1] for pair in chosen]


def plan_unseen_pairs(
    pairs: list[tuple[str, str]],
    cutouts: dict[str, list[Cutout]],
    grounds: dict[str, Background],
    count: int,
    image_px: int,
    prefix: str,
    rng: np.random.Generator,
) -> list[Scene]:
    """Evaluation scenes of one pair each, with one exact spatial caption; every third pair also mirrored.

    The mirrored scene has the same ground and the same cut-outs (not flipped) in mirrored places, so that
    only the relation tells the two apart.
    """
    scenes: list[Scene] = []
    ground_names = sorted(grounds)
    for index, names in enumerate(pairs):
        parts = [cutouts[name][int(rng.integers(len(cutouts[name])))] for name in names]
        boxes = place(parts, image_px, (0.3, 0.55), rng)
        while len(found := _relations(boxes[0], boxes[1])) != 1:
            boxes = place(parts, image_px, (0.3, 0.55), rng)
        ground = ground_names[int(rng.integers(len(ground_names)))]
        origin, flip = (float(rng.random()), float(rng.random())), bool(rng.integers(2))
        views = [(boxes, found[0])]
        if index % 3 == 0:
            views.append(([_mirror(box, found[0], image_px) for box in boxes], _INVERSE[found[0]]))
        for view, relation in views:
            if len(scenes) < count:
                a, b = with_article(names[0]), with_article(names[1])
                caption = f"{a} {relation} {b}" if rng.integers(2) else f"{b} {_INVERSE[relation]} {a}"
                objects = tuple(Placed(*row) for row in zip(names, parts, view, strict=True))
                scenes.append(Scene(f"{prefix}-{len(scenes):05d}", ground, origin, flip, objects, (caption,)))
    return scenes


def _mirror(box: tuple[int, int, int, int], relation: str, image_px: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    if relation in ("above", "below"):
        return left, image_px - bottom, right, image_px - top
    return image_px - right, top, image_px - left, bottom


def _turned(box: tuple[int, int, int, int], image_px: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return image_px - right, image_px - bottom, image_px - left, image_px - top


def _distinct(a: str, b: str) -> bool:
    return not set(a.split()) & set(b.split())


@lru_cache(maxsize=2048)
def _visible(cutout: Cutout) -> Image.Image:
    with Image.open(cutout.path) as image:
        visible = image.convert("RGBA").crop(cutout.crop)
    if max(visible.size) > CUTOUT_PX:
        visible = visible.resize(cutout.size(CUTOUT_PX), Image.Resampling.LANCZOS)
    return visible


def draw_scene(scene: Scene, grounds: dict[str, Background], image_px: int) -> Image.Image:
    """The scene as an RGB picture of `image_px` × `image_px`."""
    ground = grounds[scene.background].image
    left, top = (round(part * (side - image_px)) for part, side in zip(scene.origin, ground.size, strict=True))
    canvas = ground.crop((left, top, left + image_px, top + image_px))
    if scene.mirrored_ground:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for placed in scene.objects:
        size = placed.box[2] - placed.box[0], placed.box[3] - placed.box[1]
        if placed.card is not None:
            canvas.paste(placed.card_colour, placed.card)
        pasted = _visible(placed.cutout).resize(size, Image.Resampling.BICUBIC)
        canvas.paste(pasted, placed.box[:2], pasted)
    return canvas
