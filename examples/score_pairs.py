"""How well texts fit pictures, pair by pair: python examples/score_pairs.py --pairs pictures --model runs/mine

Worst pairs first: captions at the top are worth a look. Any file of docs/formats.md will do.
"""

from __future__ import annotations

import csv

from jsonargparse import auto_cli

import qformers
from qformers.data.config import SourceConfig
from qformers.data.sources import open_source, picture_of


def main(
    pairs: str = "pictures", model: str = "runs/mine", output: str = "scores.csv", images: str | None = None
) -> None:
    """Score every pair by ITC and by ITM, and write the table."""
    matcher = qformers.load(model)
    records = [
        (record, caption)
        for record in open_source(SourceConfig(pairs, images=images))
        for caption in record["captions"]
    ]
    rows = []
    for start in range(0, len(records), 64):
        batch = records[start : start + 64]
        pictures, captions = [picture_of(record) for record, _ in batch], [caption for _, caption in batch]
        matches = matcher.match(pictures, captions)
        cosines = matcher.itc(pictures, captions).diagonal()
        for (record, caption), match, cosine in zip(batch, matches, cosines, strict=True):
            rows.append((float(match), float(cosine), record["name"], caption))
    rows.sort()
    with open(output, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("match", "cosine", "image", "caption"), *rows])
    for match, cosine, name, caption in rows[:10]:
        print(f"{match:.3f}  {cosine:.3f}  {name}  {caption}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
