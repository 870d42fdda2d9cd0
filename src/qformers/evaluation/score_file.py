"""ITM logits on disk as they are computed, so that a re-ranking of hours goes on where it was killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from qformers.errors import DataError

ROW = np.dtype("<f4")
HEADER_BYTES = 256


class ScoreFile:
    """A header of HEADER_BYTES, then rows of two float32: the logits of the pairs, in their order.

    Rows are only ever appended, so what a killed process left is a prefix; a row cut short is written again.
    """

    def __init__(self, path: str | Path, key: str, pairs: int) -> None:
        """Open or create `path` for `pairs` pairs of what `key` stands for.

        Raises:
            DataError: it holds the scores of something else, or cannot be written.
        """
        self.path = Path(path)
        self.pairs = pairs
        header = json.dumps({"format": "qformers.scores.1", "key": key, "pairs": pairs}).encode().ljust(HEADER_BYTES)
        try:
            stored = self.path.read_bytes()[:HEADER_BYTES] if self.path.exists() else b""
            if len(stored) < HEADER_BYTES and header.startswith(stored):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_bytes(header)
            elif stored != header:
                raise DataError(
                    f"{self.path}: holds something else than the scores of this model on this data: give another file, "
                    "or remove it"
                )
        except OSError as error:
            raise DataError(f"{self.path}: cannot be used for scores ({error})") from error

    @property
    def done(self) -> int:
        """Pairs whose logits are there."""
        return min(self.pairs, (self.path.stat().st_size - HEADER_BYTES) // (2 * ROW.itemsize))

    def read(self) -> Float[np.ndarray, "done 2"]:
        """The logits that are there."""
        rows = np.fromfile(self.path, ROW, count=2 * self.done, offset=HEADER_BYTES)
        return rows.reshape(-1, 2)

    def append(self, parts: Iterator[Float[np.ndarray, "part 2"]], start: int) -> None:
        """Write the logits of the pairs from `start` on, part by part, each on disk before the next is asked for."""
        with self.path.open("r+b") as file:
            file.truncate(HEADER_BYTES + 2 * ROW.itemsize * start)
            file.seek(0, os.SEEK_END)
            for part in parts:
                file.write(np.ascontiguousarray(part, ROW).tobytes())
                file.flush()
                os.fsync(file.fileno())


def score_key(model: str, texts: list[str], pictures: str, pairs: tuple[Int[np.ndarray, " pairs"], ...]) -> str:
    """Stands for a model (its fingerprint), texts, pictures (theirs) and pairs: another of any gives another key."""
    digest = hashlib.sha256(json.dumps([model, pictures, texts]).encode())
    for indices in pairs:
        digest.update(np.ascontiguousarray(indices, np.int64).tobytes())
    return digest.hexdigest()
