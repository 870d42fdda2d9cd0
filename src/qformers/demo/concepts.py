"""What the demo's pictures show, in words, and which of those concepts training never sees.

The split is by concept, never by picture, because one concept recurs across vendors (the poodle of one
emoji set, of another, of a stamp). It works in three steps:

1. Emoji are gathered into groups of variants of one thing (`variant_group`): "man running", "woman running"
   and "person running" are one group, so are "dog" and "dog face". A group stays on one side as a whole. All
   vendors' pictures of an emoji belong to one concept (they share the code point), so they stay together too.
2. Held-out and validation concepts are whole groups of emoji, drawn by seed.
3. A picture that is no emoji (a stamp) goes to training unless it seems to show a held-out concept (`shows`):
   its file name or caption contains the held-out label; or else, where its name is not itself the label of a
   training emoji, they contain the label's head noun ("red apple" → every apple; "mountaingoat" ends in
   "goat"), or each word of its name is in the label or keywords of the held-out emoji ("ladybug" for "lady
   beetle", "fire truck" for "fire engine"). Words are compared in the singular.

The match errs on the strict side ("ship" held out drops a spaceship). Its limits: it is a match of words, so
a synonym that the emoji keywords do not list ("tugboat" for "ship") passes; so does a stamp that shows a
second thing its words do not name; and different emoji of one kind ("poodle" held out, "guide dog" trained
on) are different concepts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformers.errors import ConfigError, DataError

COMPONENT_GROUP, FLAG_GROUP = 2, 9
SMALL_VENDORS = ("google", "twitter")  # packages laid out alike: 64 px and an index
# Emoji subgroups (emojibase's numbers) whose labels name one thing that can stand in a scene: animals,
# plants, food, drink, dishes, vehicles, things for sport, games and music, clothes, devices, tools.
CONCRETE_SUBGROUPS = frozenset((*range(34, 49), 54, 55, 56, 57, 62, 63, 65, 67, 68, 69, 70, 71, 78, 79, 80, 81))
# Labels in those subgroups that are no countable thing ("a bacon"), or show another than they name.
NO_OBJECT = frozenset({
    "airplane arrival", "airplane departure", "american football", "bacon", "badminton", "billed cap",
    "blossom", "bowling", "bread", "broccoli", "butter", "canned food", "construction", "cooked rice",
    "cooking", "coral", "cricket", "cricket game", "curry rice", "custard", "cut of meat", "dna",
    "drop of blood", "dvd", "ear of corn", "falafel", "field hockey", "fish cake with swirl", "fondue",
    "french fries", "garlic", "ginger root", "green salad", "herb", "horizontal traffic light", "ice",
    "ice hockey", "joker", "knot", "lacrosse", "leaf fluttering in wind", "leafy green", "light rail",
    "link", "lotus", "low battery", "mahjong red dragon", "martial arts uniform", "mate", "meat on bone",
    "metro", "microbe", "mobile phone with arrow", "mountain cableway", "mountain railway", "mouse trap",
    "musical note", "musical score", "nose", "oden", "pig nose", "ping pong", "popcorn", "pot of food",
    "pouring liquid", "roll of paper", "rugby football", "running shirt", "sake", "salt", "seat",
    "shallow pan of food", "shaved ice", "sheaf of rice", "soap", "softball", "spaghetti", "station",
    "sushi", "suspension railway", "takeout box", "tennis", "tumbler glass", "wheel", "white flower",
    "wing", "x-ray",
})  # fmt: skip
_GENDER = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|mx|mrs|santa)\b")
_SAME = {"mermaid": "merperson", "merman": "merperson", "princess": "prince", "old": "older"}
_PHRASE = re.compile(r" (of|at|in|on|with|from|for|playing|dancing|called) ")
_JOINTS = re.compile(r":| with | without | in | on | at | for | from | over | behind | showing ")


@dataclass(frozen=True)
class Picture:
    """One picture file and the source (vendor) it comes from."""

    path: Path
    source: str


@dataclass(frozen=True)
class Concept:
    """One thing, the words for it and its pictures.

    `noun` is a countable name for captions of scenes ("poodle" → "a poodle"), None where there is none.
    `group` names the variants that must stay on one side of the split; it is empty for what is no emoji.
    `words` are all words about it and `names` its whole names, in the singular, to find it by in the split.
    """

    key: str
    label: str
    tags: tuple[str, ...]
    pictures: tuple[Picture, ...]
    group: str = ""
    noun: str | None = None
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Concepts on each side; `dropped` are pictures that show a held-out concept and so are used nowhere."""

    train: tuple[Concept, ...]
    held_out: tuple[Concept, ...]
    validation: tuple[Concept, ...]
    dropped: tuple[Concept, ...]


def load_emoji(folders: dict[str, Path]) -> list[Concept]:
    """Emoji with their words, without flags, components and skin tones; none without words or pictures."""
    if "emojibase" not in folders or not folders.keys() & {"fluent", *SMALL_VENDORS}:
        return []
    words = json.loads(_find(folders["emojibase"], "data.json").read_text(encoding="utf-8"))
    vendors = _vendor_pictures(folders)
    concepts: dict[str, Concept] = {}
    for entry in words:
        if entry.get("group") in (None, COMPONENT_GROUP, FLAG_GROUP):
            continue
        code, label = entry["hexcode"].lower(), entry["label"].replace("’", "'")
        pictures = tuple(Picture(found[code], source) for source, found in vendors.items() if code in found)
        if not pictures or label in concepts:
            continue
        tags = tuple(entry.get("tags", ()))
        noun = label if entry.get("subgroup") in CONCRETE_SUBGROUPS and _is_countable(label) else None
        concepts[label] = Concept(code, label, tags, pictures, variant_group(label), noun, tuple(_tokens(label)))
    return list(concepts.values())


def load_stamps(folders: dict[str, Path]) -> list[Concept]:
    """Tux Paint's stamps: one concept each, captioned with the first line of the text file beside it."""
    if "tuxpaint" not in folders:
        return []
    concepts = []
    for path in sorted(folders["tuxpaint"].rglob("*.png")):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip() if text.exists() else ""
        if not caption:
            continue  # mirrored twins, which carry no words of their own
        said = re.fullmatch(r"An? ([a-z][a-z -]*[a-z])\.", caption)
        noun = said[1] if said and len(said[1].split()) <= 3 and not _PHRASE.search(said[1]) else None
        words = tuple(_tokens(f"{path.stem} {caption.split('. ')[0]}"))
        names = tuple(name for text in (path.stem, noun or "") if (name := " ".join(_tokens(text))))
        key = "-".join(path.relative_to(folders["tuxpaint"]).with_suffix("").parts).lower()
        concepts.append(Concept(key, caption, (), (Picture(path, "tuxpaint"),), "", noun, words, names))
    return concepts


def split_concepts(
    emoji: list[Concept], others: list[Concept], held_out: int, validation: int, rng: np.random.Generator
) -> Split:
    """Draws whole variant groups until exactly `held_out` and `validation` emoji are set aside.

    Raises ConfigError when there are not enough emoji to leave at least one for training.
    """
    if held_out + validation >= len(emoji) and emoji:
        raise ConfigError(
            f"{held_out} held-out and {validation} validation concepts leave none of {len(emoji)} to train on"
        )
    groups: dict[str, list[Concept]] = {}
    for concept in emoji:
        groups.setdefault(concept.group, []).append(concept)
    found = {concept.pictures[0].source for concept in emoji}
    primary = next((vendor for vendor in ("fluent", *SMALL_VENDORS) if vendor in found), None)
    order = [list(groups.values())[index] for index in rng.permutation(len(groups))]
    sides: list[list[Concept]] = []
    for wanted in (held_out, validation) if emoji else ():
        side: list[Concept] = []
        for group in list(order):
            # Only pictures of the primary vendor are candidates, so a group with a gap stays in training.
            if len(side) + len(group) <= wanted and all(c.pictures[0].source == primary for c in group):
                side += group
                order.remove(group)
        if len(side) < wanted:
            raise ConfigError(f"{wanted} emoji were to be held out, but whole groups of variants give only {len(side)}")
        sides.append(side)
    kept = [concept for group in order for concept in group]
    unseen = [concept for side in sides for concept in side]
    labels = {" ".join(concept.words) for concept in kept}
    train = [other for other in others if not any(shows(other, concept, labels) for concept in unseen)]
    held, checked = sides if sides else ([], [])
    trained = {id(concept) for concept in train}
    dropped = tuple(other for other in others if id(other) not in trained)
    return Split((*sorted(kept, key=lambda c: c.key), *train), tuple(held), tuple(checked), dropped)


def shows(other: Concept, emoji: Concept, training_labels: set[str]) -> bool:
    """Whether the words of `other` say that it shows `emoji` (rule and limits: the module's docstring)."""
    if f" {' '.join(emoji.words)} " in f" {' '.join(other.words)} ":
        return True
    if any(name in training_labels for name in other.names):
        return False
    thing = _JOINTS.split(emoji.label)[0]
    heads = {tokens[-1] for part in re.split(r" of | and |, ", thing) if (tokens := _tokens(part))}
    for word in other.words:
        if any(word == head or (len(head) > 3 and word.endswith(head)) for head in heads):
            return True
    keywords = {*emoji.words, *_tokens(" ".join(emoji.tags))}
    return any(keywords.issuperset(name.split()) for name in other.names)


def variant_group(label: str) -> str:
    """The name shared by variants of one emoji: without gender, age words, "face" and "oncoming"."""
    if label.startswith(("family", "kiss", "couple with heart")) and label != "kiss mark":
        return label.split(":")[0]
    words = _GENDER.sub(" ", re.sub(r"[:.]", " ", label.lower())).split()
    words = [_SAME.get(word, word) for word in words if word not in ("and", "oncoming")]
    if len(words) == 2 and words[1] == "face":
        words = words[:1]
    return " ".join(words) or "person"


def with_article(noun: str) -> str:
    """ "a poodle", "an owl", "a unicorn"."""
    sounds_like_vowel = re.match(r"(?i)(?!eu|ewe|uni|use|uku|ufo|one\b|one-)[aeiou]|hour|x-ray", noun)
    return f"{'an' if sounds_like_vowel else 'a'} {noun}"


def emoji_captions(concept: Concept, rng: np.random.Generator, extra: int = 3) -> list[str]:
    """The label first, then the label with some of its keywords in various choices ("poodle, dog, pet")."""
    captions = [concept.label]
    if concept.noun:
        captions.append(with_article(concept.noun))
    fresh = fresh_tags(concept)
    for _ in range(extra if fresh else 0):
        chosen = rng.permutation(len(fresh))[: int(rng.integers(1, 4))]
        captions.append(", ".join([concept.label, *(fresh[index] for index in chosen)]))
    return list(dict.fromkeys(captions))


def fresh_tags(concept: Concept) -> list[str]:
    """The keywords that say something the label does not say already."""
    return [tag for tag in concept.tags if tag.lower() not in concept.label.lower()]


def _is_countable(label: str) -> bool:
    plural = label.endswith("s") and not label.endswith(("ss", "us"))
    odd = label.endswith(" face") or label.startswith("oncoming") or re.search(r"[:,(]|\b(and|left|right)\b", label)
    return not (plural or odd or label in NO_OBJECT)


def _tokens(text: str) -> list[str]:
    """Lower-case words in the singular (by English's regular endings), digits and punctuation left out."""
    split_camel = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [_singular(word) for word in re.findall(r"[a-z]+", split_camel.lower().replace("'s", ""))]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "oes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _vendor_pictures(folders: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """Per vendor (Fluent first, the primary one), the picture of each emoji by its lower-case code points."""
    vendors: dict[str, dict[str, Path]] = {}
    if "fluent" in folders:
        vendors["fluent"] = {path.stem.lower(): path for path in sorted(folders["fluent"].rglob("*.webp"))}
    for vendor in SMALL_VENDORS:
        if vendor not in folders:
            continue
        files = {path.name: path for path in sorted(folders[vendor].rglob("*.png"))}
        index = json.loads(_find(folders[vendor], "emoji.json").read_text(encoding="utf-8"))
        named = {entry["unified"].lower(): entry["image"] for entry in index}
        vendors[vendor] = {code: files[name] for code, name in named.items() if name in files}
    return vendors


def _find(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(name))
    if not found:
        raise DataError(f"{folder} holds no {name}: fetch the demo's assets again")
    return found[0]
