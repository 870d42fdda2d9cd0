"""The index on disk: one LanceDB table, a row for each image, its query vectors as a multivector.

Every change is one commit of Lance's: a process killed at any moment leaves the table as its last commit was. Readers
see the newest commit at each search and are never in the way of the one writer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float
from lancedb.index import IvfPq
from lancedb.table import Table

from qformers.errors import ConfigError, DataError

FORMAT = "qformers.index.1"
TABLE = "images"
VECTORS = "vectors"
SETTINGS_KEY = b"qformers"
FIXED_COLUMNS = (
    pa.field("path", pa.string(), nullable=False),  # from the indexed folder, with "/"
    pa.field("bytes", pa.int64(), nullable=False),
    pa.field("width_px", pa.int32(), nullable=False),
    pa.field("height_px", pa.int32(), nullable=False),
    pa.field("modified", pa.timestamp("us", tz="UTC"), nullable=False),
    pa.field("sha256", pa.string(), nullable=False),  # of the file
    pa.field("record_sha256", pa.string(), nullable=False),  # of its caption and the user's columns
    pa.field("caption", pa.string()),
)
MINIMUM_TO_TRAIN = 5000  # vectors: below, comparing all takes milliseconds
DIMENSIONS_PER_CODE = 4  # of the product quantiser: 64 bytes for a vector of 256
RESERVED = {field.name for field in FIXED_COLUMNS} | {VECTORS, "_distance", "_rowid"}


@dataclass(frozen=True)
class Approximation:
    """How hard an approximate search looks: partitions read, and candidates per result compared exactly."""

    probes: int = 20
    refine: int = 10


@dataclass(frozen=True)
class IndexSettings:
    """What an index was made of. `fingerprint` is that of the model's weights."""

    folder: str
    model: str
    fingerprint: str
    num_queries: int
    embed_dim: int
    format: str = FORMAT

    def check_model(self, place: Path, model: str, fingerprint: str) -> None:
        """Raise ConfigError unless that model made the index."""
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"{place}: was made by the model {self.model} ({self.fingerprint[:12]}), not by {model} "
                f"({fingerprint[:12]}): their vectors cannot be compared; use the first, or index anew elsewhere"
            )


def has_table(place: Path) -> bool:
    """Whether a first commit was made at `place`; a kill before it may leave a folder that is no table."""
    return any((place / f"{TABLE}.lance" / "_versions").glob("*.manifest"))


def open_table(place: Path) -> tuple[Table, IndexSettings]:
    """The table of an index, always at its newest commit.

    Raises:
        DataError: there is none, or of another version.
    """
    if not has_table(place):
        raise DataError(f"{place}: there is no index here: make one with `qformers index FOLDER --index {place}`")
    try:
        table = lancedb.connect(place, read_consistency_interval=timedelta(0)).open_table(TABLE)
        settings = json.loads((table.schema.metadata or {})[SETTINGS_KEY])
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise DataError(f"{place}: the index cannot be read ({_one_line(error)})") from error
    if settings.get("format") != FORMAT:
        raise DataError(f"{place}: index format {settings.get('format')!r}, this version reads {FORMAT}")
    return table, IndexSettings(**settings)


def create_table(place: Path, settings: IndexSettings, columns: Sequence[pa.Field]) -> Table:
    """An empty index with the user's `columns` beside the fixed ones."""
    vectors = pa.field(VECTORS, pa.list_(pa.list_(pa.float32(), settings.embed_dim)), nullable=False)
    metadata = {SETTINGS_KEY: json.dumps(asdict(settings)).encode()}
    schema = pa.schema([*FIXED_COLUMNS, *columns, vectors], metadata=metadata)
    place.mkdir(parents=True, exist_ok=True)
    return lancedb.connect(place).create_table(TABLE, schema=schema)


def put(table: Table, rows: list[dict[str, Any]], features: Float[np.ndarray, "rows queries embed_dim"]) -> None:
    """Add rows, or replace those of the same path, in one commit."""
    number, queries, dim = features.shape
    flat = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), pa.float32()), dim)
    offsets = np.arange(0, (number + 1) * queries, queries, dtype=np.int32)
    columns = [
        pa.ListArray.from_arrays(offsets, flat)
        if field.name == VECTORS
        else pa.array([row.get(field.name) for row in rows], field.type)
        for field in table.schema
    ]
    new = pa.Table.from_arrays(columns, schema=table.schema)
    table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(new)


def build_approximate(table: Table) -> None:
    """An approximate vector index of every row, beside the exact vectors; `Table.optimize` takes in later rows.

    IVF-PQ with as many partitions as the square root of the vectors. Too few vectors to train it on: none is built,
    and none is needed.
    """
    vectors = table.schema.field(VECTORS).type.value_type
    number = table.count_rows() * json.loads((table.schema.metadata or {})[SETTINGS_KEY])["num_queries"]
    if number < MINIMUM_TO_TRAIN:
        return
    config = IvfPq(
        distance_type="cosine",
        num_partitions=max(1, round(number**0.5)),
        num_sub_vectors=max(1, vectors.list_size // DIMENSIONS_PER_CODE),
    )
    table.create_index(VECTORS, config=config)


def drop(table: Table, paths: Sequence[str], at_once: int = 500) -> None:
    """Remove the rows of `paths`."""
    for start in range(0, len(paths), at_once):
        names = ", ".join("'" + path.replace("'", "''") + "'" for path in paths[start : start + at_once])
        table.delete(f"path IN ({names})")


def scan(table: Table, columns: Sequence[str]) -> pa.Table:
    """Those columns of every row."""
    return table.search().select(list(columns)).limit(max(1, table.count_rows())).to_arrow()


def nearest(
    table: Table,
    vectors: Float[np.ndarray, "vectors embed_dim"],
    k: int,
    where: str | None,
    approximate: Approximation | None,
) -> pa.Table:
    """The `k` rows with the least `_distance`: the sum over `vectors` of 1 - the largest cosine with the row's vectors.

    That is LanceDB's distance "cosine" over multivectors; a single vector gives 1 - BLIP-2's maximum over the queries.

    Raises:
        DataError: `where` is no condition on the columns.
    """
    # Its declared type is that of every kind of search; of vectors it is this one.
    query: Any = table.search(vectors if len(vectors) > 1 else vectors[0], vector_column_name=VECTORS)
    query = (
        query.distance_type("cosine")
        .limit(k)
        .select([field.name for field in table.schema if field.name != VECTORS] + ["_distance"])
    )
    if where is not None:
        query = query.where(where, prefilter=True)
    if approximate is None:
        query = query.bypass_vector_index()  # every row is compared
    else:
        query = query.nprobes(approximate.probes).refine_factor(approximate.refine)
    try:
        return query.to_arrow()
    except (ValueError, RuntimeError, OSError) as error:
        if where is None:
            raise
        names = ", ".join(field.name for field in table.schema if field.name != VECTORS)
        reason = _one_line(error)[:200]
        raise DataError(f"--filter {where!r} cannot be applied ({reason}); the columns are {names}") from error


def export(table: Table, file: str | Path, rows_at_once: int = 1024) -> None:
    """Write every row, vectors included (lists of lists of float32), to a new parquet file, batch by batch.

    Raises:
        ConfigError: the file is there already. DataError: it cannot be written.
    """
    file = Path(file)
    if file.exists():
        raise ConfigError(f"{file} is there already: give another file, or remove it")
    unfinished = file.with_name(f".unfinished_{file.name}")
    try:
        with pyarrow.parquet.ParquetWriter(unfinished, table.schema) as writer:
            for batch in table.search().limit(max(1, table.count_rows())).to_batches(rows_at_once):
                writer.write_batch(batch)
        unfinished.rename(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
