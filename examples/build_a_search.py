"""A searchable folder of pictures: python examples/build_a_search.py --pictures pictures --model runs/mine

The index is a folder on disk; run again, it takes in what is new, changed or gone.
"""

from __future__ import annotations

from jsonargparse import auto_cli

import qformers
from qformers.search.indexing import index_folder


def main(
    pictures: str = "pictures",
    model: str = "runs/mine",
    index: str = "runs/index",
    text: str = "a cat on a sofa",
    results: int = 5,
) -> None:
    """Index the pictures, then ask by text, by the best picture found, and by both."""
    print(index_folder(pictures, model, index))
    found = qformers.Index.open(index)

    hits = found.search(text, k=results, rerank=4 * results)
    for hit in hits:
        print(f"{hit.score:.3f}  cosine {hit.similarity:.3f}  match {hit.match:.3f}  {hit.path}")

    best = found.picture(hits[0].path)
    print("like it:", ", ".join(hit.path for hit in found.search(image=best, k=results)))
    print("and with the text:", ", ".join(hit.path for hit in found.search(text, best, k=results)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
