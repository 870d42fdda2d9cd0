"""Clip art with the titles that its authors gave it, "SVG Road Signs" among them: the honest test for CapFilt.

python benchmarks/openclipart.py --output runs/clipart.jsonl --pictures 400
qformers capfilt runs/clipart.jsonl --captioner runs/demo/captioner_t5 --ranker runs/demo/run --output runs/clipart
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from qformers.demo.assets import fetch

TITLE = "{http://purl.org/dc/elements/1.1/}title"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--pictures", type=int, help="so many, chosen at random; default: all that have a title")
    options = parser.parse_args()
    drawings, pictures = fetch("openclipart-svg"), fetch("openclipart-png")
    rows = []
    for drawing in sorted(drawings.rglob("*.svg")):
        name = drawing.relative_to(drawings).with_suffix(".png")
        title = title_of(drawing)
        if title and (pictures / name).is_file():
            rows.append({"image": str(pictures / name), "caption": title, "image_id": name.as_posix()})
    print(f"{len(rows)} pictures with a title, {len({row['caption'] for row in rows})} different titles")
    if options.pictures is not None:
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[: options.pictures])
        rows = [rows[place] for place in chosen]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def title_of(drawing: Path) -> str | None:
    """The first title in an SVG's metadata; None where there is none, or no XML."""
    try:
        found = next(ElementTree.parse(drawing).iter(TITLE), None)
    except ElementTree.ParseError:
        return None
    return " ".join(found.text.split()) if found is not None and found.text else None


if __name__ == "__main__":
    main()
