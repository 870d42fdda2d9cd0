"""BLIP-2 between formats: python examples/convert_a_checkpoint.py --source Salesforce/blip2-opt-2.7b --picture cat.jpg

Into our format, in which training goes on, and back into Hugging Face's; then all three are asked the same.
"""

from __future__ import annotations

from jsonargparse import auto_cli

import qformers
from qformers.convert.run import convert


def main(
    source: str = "Salesforce/blip2-opt-2.7b",
    ours: str = "runs/converted",
    theirs: str = "runs/exported",
    picture: str = "cat.jpg",
) -> None:
    """Convert there and back, weight by weight, and compare captions."""
    convert(source, ours, "qformers")
    convert(ours, theirs, "hf")
    captions = [qformers.load(folder).caption(picture, num_beams=3)[0] for folder in (source, ours, theirs)]
    print(*captions, sep="\n")
    if len(set(captions)) > 1:
        raise SystemExit("the formats do not say the same")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
