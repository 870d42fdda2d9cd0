"""Exact and approximate search of many images' query vectors, generated: recall, latency, size, memory.

`python benchmarks/approximate_index.py --images 100000 --output DIR` writes DIR/approximate_index.json. DIR needs some
8 GB for 100,000 images of 32 vectors of 256. Vectors of an image lie around a common one, images around 1000 topics; a
query lies near a vector of some image. Rows go in as the indexer puts them in, batch by batch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np

from qformers.search.indexing import COMMIT_IMAGES
from qformers.search.table import Approximation, IndexSettings, build_approximate, create_table, nearest, put

QUERIES, DIM, TOPICS, K = 32, 256, 1000, 10
SETTINGS = IndexSettings("generated", "none", "", QUERIES, DIM)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--searches", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the index and the result")
    options = parser.parse_args()
    place = options.output / "approximate_index"
    shutil.rmtree(place, ignore_errors=True)
    table, asked, start = create_table(place, SETTINGS, []), [], time.perf_counter()
    memory = []
    for first, features in generate(options.images):
        rows = [row(first + number) for number in range(len(features))]
        put(table, rows, features)
        memory.append(peak_gb())
        if len(asked) < options.searches:
            asked.append(near(features[0, 0], seed=first))
    result: dict[str, object] = {
        "images": options.images,
        "vectors_per_image": QUERIES,
        "insert_seconds": time.perf_counter() - start,
        # Bounded: what the second half adds to the peak.
        "peak_gb": {"half way": memory[len(memory) // 2], "whole": memory[-1]},
    }
    table.optimize()
    exact_gb, start = size_gb(place), time.perf_counter()
    build_approximate(table)
    result |= {"build_seconds": time.perf_counter() - start, "peak_gb_with_build": peak_gb()}
    result |= {"exact_gb": exact_gb, "approximate_gb": size_gb(place) - exact_gb}
    exact, seconds = search(table, asked, None)
    result["exact_seconds"] = median(seconds)
    tried = []
    for probes, refine in ((20, 10), (50, 10), (50, 50), (100, 50)):
        found, seconds = search(table, asked, Approximation(probes, refine))
        recall = float(np.mean([len(a & b) / K for a, b in zip(exact, found, strict=True)]))
        tried.append({"probes": probes, "refine": refine, "recall_at_10": recall, "seconds": median(seconds)})
        print(tried[-1])
    result["approximate"] = tried
    shutil.rmtree(place)
    (options.output / "approximate_index.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def generate(images: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches of vectors of unit length, images x queries x dim, with the number of the first image."""
    topics = np.random.default_rng(0).standard_normal((TOPICS, DIM), dtype=np.float32)
    for first in range(0, images, COMMIT_IMAGES):
        draw, number = np.random.default_rng((1, first)), min(COMMIT_IMAGES, images - first)
        centres = topics[draw.integers(0, TOPICS, number)] + draw.standard_normal((number, DIM), dtype=np.float32)
        features = centres[:, None] + draw.standard_normal((number, QUERIES, DIM), dtype=np.float32)
        yield first, features / np.linalg.norm(features, axis=-1, keepdims=True)


def near(vector: np.ndarray, seed: int) -> np.ndarray:
    """A vector of unit length whose cosine with `vector` is about 0.8."""
    moved = vector + 0.75 * np.random.default_rng((2, seed)).standard_normal(DIM, dtype=np.float32) / DIM**0.5
    return moved / np.linalg.norm(moved)


def row(number: int) -> dict[str, object]:
    """The columns of an image that is none."""
    now = datetime.now(timezone.utc)
    sizes = {"bytes": 0, "width_px": 1, "height_px": 1, "modified": now}
    return {"path": f"{number:08d}.jpg", "sha256": "", "record_sha256": "", **sizes}


def search(table, asked: list[np.ndarray], how: Approximation | None) -> tuple[list[set[str]], list[float]]:
    """The K best paths of each query, and how long each took."""
    found, seconds = [], []
    for vector in asked:
        start = time.perf_counter()
        found.append(set(nearest(table, vector[None], K, None, how)["path"].to_pylist()))
        seconds.append(time.perf_counter() - start)
    return found, seconds


def peak_gb() -> float:
    """The most memory that this process has held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def size_gb(place: Path) -> float:
    """Of all files below `place`."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 1e9


if __name__ == "__main__":
    main()
