"""Makes stores of precomputed features, shard by shard, on any number of processes at once.

Process `rank` of `processes` makes shards rank, rank + processes, …; a shard takes its name when it is whole and on the
disk, so a killed process loses the shard that it was at, and the next run makes what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qformers.data.features import FIX, FORMAT, FeatureKey, FeatureStore, checksum, read_header, row_bytes
from qformers.errors import DataError

SHARD_BYTES = 256 << 20
SHARD_ROWS = 1024

logger = logging.getLogger(__name__)


def create_store(folder: str | Path, key: FeatureKey, records: int, patches: int, dim: int) -> FeatureStore:
    """A store to write to. One with the same key goes on, and if it is complete it is checked: damaged shards are named
    and removed, to be made again. Any other is replaced.

    Raises:
        DataError: what is left to write does not fit on the disk.
    """
    folder = Path(folder)
    store = FeatureStore(
        folder, {"format": FORMAT, "key": key.flat(), "records": records, "patches": patches, "dim": dim}
    )
    store.header["rows_per_shard"] = max(1, min(SHARD_ROWS, SHARD_BYTES // store.row_bytes))
    folder.mkdir(parents=True, exist_ok=True)
    if _header_of(folder) != store.header:
        # New files, not the old ones emptied: a run that still reads the old store keeps what it has mapped.
        for stale in [*folder.glob("features-*"), *folder.glob("features.bf16")]:
            stale.unlink()
        _write_header(store)
    elif not store.missing():
        for number in range(store.shards):
            if reason := store.damaged(number):
                logger.warning("%s: %s: it is made again", store.shard_path(number), reason)
                store.shard_path(number).unlink()
    _check_space(store)
    return store


def write_shards(
    store: FeatureStore,
    batches: Callable[[list[range]], Iterable[Float[Tensor, "batch 3 height width"]]],
    encode: Callable[[Tensor], Tensor],
    rank: int = 0,
    processes: int = 1,
    batch_size: int = 64,
) -> None:
    """Run `encode` over the pictures of this process's missing shards.

    `batches` gives `pixel_values` of the rows asked for, in turn (row = record x views + view). A picture that could
    not be decoded is a row of NaN pixels: its features are NaN and `FeatureStore.read` refuses it. Progress goes to
    stderr.

    Raises:
        DataError: `encode` gives values that are not finite, `batches` ends early, or the disk is full.
    """
    missing = [number for number in store.missing() if number % processes == rank]
    pieces = [
        (number, range(first, min(first + batch_size, rows.stop)))
        for number, rows in ((number, store.shard_rows(number)) for number in missing)
        for first in range(rows.start, rows.stop, batch_size)
    ]
    parts: list[Tensor] = []
    with _progress() as progress:
        task = progress.add_task("features", total=sum(len(rows) for _, rows in pieces))
        pictures = iter(batches([rows for _, rows in pieces]) if pieces else ())
        for number, rows in pieces:
            pixel_values = next(pictures, None)
            if pixel_values is None:
                raise DataError(f"{store.folder}: pictures ended before row {rows.start} of {store.rows}: {FIX}")
            parts.append(_encode(pixel_values, encode, rows.start, store))
            if rows.stop == store.shard_rows(number).stop:
                _write_shard(store, number, torch.cat(parts))
                parts = []
            progress.advance(task, len(rows))


def int8_error(store: FeatureStore) -> float:
    """How far an int8 store's rows are from what they were made of: root mean square error by root mean square."""
    errors, squares = 0.0, 0.0
    for number in range(store.shards):
        with safe_open(store.shard_path(number), framework="pt") as file:
            facts = file.metadata()
        errors, squares = errors + float(facts["squared_error"]), squares + float(facts["squared"])
    return (errors / max(squares, 1e-30)) ** 0.5


def quantise(
    features: Float[Tensor, "rows patches dim"],
) -> tuple[Float[Tensor, "rows patches dim"], Float[Tensor, "rows patches"]]:
    """Whole numbers from -127 to 127, and what each patch's are to be multiplied with. A NaN patch has a NaN scale."""
    scales = features.abs().amax(dim=2) / 127
    scales = torch.where(scales == 0, 1.0, scales)
    return (features / scales[:, :, None]).round().nan_to_num(0.0), scales


def _write_shard(store: FeatureStore, number: int, features: Float[Tensor, "rows patches dim"]) -> None:
    tensors, facts = {"features": features.bfloat16().contiguous()}, {}
    if store.dtype == "int8":
        levels, scales = quantise(features.float())
        wrong = (levels * scales[:, :, None] - features.float()).nan_to_num(0.0)
        facts = {
            "squared_error": str(wrong.double().pow(2).sum().item()),
            "squared": str(features.double().nan_to_num(0.0).pow(2).sum().item()),
        }
        tensors = {"features": levels.to(torch.int8), "scales": scales}
    rows = zip(*row_bytes(list(tensors.values())), strict=True)
    sums = torch.tensor([checksum(list(parts)) for parts in rows], dtype=torch.int64)
    path = store.shard_path(number)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file({**tensors, "checksums": sums}, partial, metadata=facts)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error}: free some space, {FIX}") from error


def _encode(
    pixel_values: Tensor, encode: Callable[[Tensor], Tensor], start: int, store: FeatureStore
) -> Float[Tensor, "batch patches dim"]:
    broken = torch.isnan(pixel_values).flatten(1).any(dim=1)
    with torch.no_grad():
        features = encode(torch.where(broken[:, None, None, None], 0.0, pixel_values)).to("cpu", torch.bfloat16)
    if features.shape[1:] != (store.patches, store.dim):
        raise DataError(
            f"{store.folder}: {tuple(features.shape)} features for a store of {store.patches} patches x {store.dim}"
        )
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise DataError(
            f"{store.folder}: the encoder's output for record {row // store.views} is not finite: "
            "run the encoder in bfloat16 or float32"
        )
    return torch.where(broken.to("cpu")[:, None, None], torch.nan, features)


def _check_space(store: FeatureStore) -> None:
    """Say how much there is to write, and whether it fits."""
    needed = sum(len(store.shard_rows(number)) for number in store.missing()) * store.row_bytes
    free = shutil.disk_usage(store.folder).free
    shape = f"{store.records} records x {store.views} views x {store.patches} patches x {store.dim}, {store.dtype}"
    if needed > free:
        raise DataError(
            f"{store.folder}: the features need {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free "
            f"({shape}): use fewer views, int8 or another disk"
        )
    logger.info("%s: %.1f MB to write, %.1f MB free (%s)", store.folder, needed / 1e6, free / 1e6, shape)


def _header_of(folder: Path) -> dict[str, Any] | None:
    try:
        return read_header(folder)
    except DataError:
        return None


def _write_header(store: FeatureStore) -> None:
    partial = store.folder / "store.json.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(store.header, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, store.folder / "store.json")


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(file=sys.stderr),
    )
