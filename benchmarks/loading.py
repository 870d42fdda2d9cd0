"""The loader against plain reading of the same files in turn: pictures from tars, and precomputed features.

`pictures`: training examples (decoded, cropped, resized, normalised, captions tokenised) by the streamed loader in this
process, against a loop that does with Pillow what cannot be left out: open, decode, crop, resize, make a tensor of it.
`workers` is the same with one loading process against the same loop. `features`: rows of a store in random order copied
into a batch, against `os.pread` of as many bytes at the same places, and (`in_place`) against `os.preadv` straight into
the batch. `first` is the first time that a process reads the store: it maps the files, and checks every row. The files
are in the page cache, where that costs most.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import datasets.config
import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer

from qformers.data.config import SourceConfig, TransformConfig
from qformers.data.dataset import CaptionDataset, make_loader
from qformers.data.feature_writing import create_store, write_shards
from qformers.data.features import FeatureKey, FeatureStore
from qformers.data.shards import RecordList, ShardRecords
from qformers.data.text import CaptionTokenizer

PICTURES, SHARDS, WIDTH, HEIGHT, PIXELS = 192, 4, 640, 480, 224
BATCH = 16
ROWS, PATCHES, DIM = 512, 257, 1024  # ViT-L: 0.5 MB a row
REPETITIONS = 5
TRANSFORM = TransformConfig(PIXELS, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def run() -> dict[str, object]:
    """Times ours and the plain loops in turn; `ratio` is the pictures' in one process."""
    torch.set_num_threads(1)  # as in a loading process; Pillow and `os.pread` have one as well
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        pictures, dataset = write_tars(Path(folder))
        store, places = write_store(Path(folder) / "features")
        order = np.random.default_rng(0).permutation(ROWS)
        timed = {
            "pictures": alternate(lambda: load(dataset, 0), lambda: plain_decode(pictures)),
            "features": alternate(lambda: read_store(store, order), lambda: plain_read(places, order)),
            "first": alternate(lambda: read_store(opened_anew(store), order), lambda: plain_read(places, order)),
            "in_place": alternate(lambda: read_store(store, order), lambda: read_in_place(places, order)),
            "workers": alternate(lambda: load(dataset, 1), lambda: plain_decode(pictures), REPETITIONS // 2 + 1),
        }
    ratios = {name: [plain / own for own, plain in rows] for name, rows in timed.items()}
    counts = {"pictures": PICTURES, "features": ROWS, "first": ROWS, "in_place": ROWS, "workers": PICTURES}
    spread = {name: {"median": median(row), "min": min(row), "max": max(row)} for name, row in ratios.items()}
    return {
        "ratio": spread["pictures"],
        "ratio_features": spread["features"],
        "ratio_features_first": spread["first"],
        "ratio_features_in_place": spread["in_place"],
        "ratio_one_worker": spread["workers"],
        "a_second": {name: counts[name] / median(own for own, _ in rows) for name, rows in timed.items()},
        "plain_a_second": {name: counts[name] / median(plain for _, plain in rows) for name, rows in timed.items()},
        "row_bytes": PATCHES * DIM * 2,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }


def alternate(
    ours: Callable[[], float], plain: Callable[[], float], repetitions: int = REPETITIONS
) -> list[tuple[float, float]]:
    """Seconds of ours and of the plain loop, in turn, after one round that does not count."""
    return [(ours(), plain()) for _ in range(repetitions + 1)][1:]


def write_tars(folder: Path) -> tuple[list[bytes], CaptionDataset]:
    """JPEGs of smooth random pictures in tars, also in memory, and the data set that streams them."""
    draw, pictures = np.random.default_rng(0), []
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(PICTURES // SHARDS):
                coarse = Image.fromarray(draw.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                pictures.append(buffer.getvalue())
                facts = json.dumps({"caption": ["a picture of the red square"] * 2}).encode()
                for suffix, content in (("jpg", pictures[-1]), ("json", facts)):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "the", "red", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "text")
    records = RecordList([ShardRecords.open(SourceConfig(str(folder / "*.tar"), stream=True))])
    return pictures, CaptionDataset(records, CaptionTokenizer.from_pretrained(folder / "text"), TRANSFORM, train=True)


def load(dataset: CaptionDataset, workers: int) -> float:
    """Seconds for one epoch of batches, from the first batch on: starting a worker process is done once a run."""
    steps = PICTURES // BATCH
    batches = iter(make_loader(dataset, BATCH, stop_step=3 * steps, workers=workers, shuffle_buffer=100))
    for _ in range(2 * workers * steps):  # a worker has read ahead by then
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        assert len(next(batches)) == BATCH
    return time.perf_counter() - start


def plain_decode(pictures: list[bytes]) -> float:
    """Seconds for the same pictures and crops with Pillow alone."""
    start = time.perf_counter()
    draw = np.random.default_rng(0)
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    for _ in range(PICTURES // BATCH):
        rows = []
        for _ in range(BATCH):
            image = Image.open(io.BytesIO(pictures[draw.integers(len(pictures))])).convert("RGB")
            share = draw.uniform(*TRANSFORM.crop_scale) ** 0.5
            width, height = int(WIDTH * share), int(HEIGHT * share)
            left, top = draw.integers(WIDTH - width + 1), draw.integers(HEIGHT - height + 1)
            image = image.crop((left, top, left + width, top + height))
            pixels = np.array(image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
            rows.append((torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std)
        torch.stack(rows)
    return time.perf_counter() - start


def write_store(folder: Path) -> tuple[FeatureStore, list[tuple[int, int]]]:
    """A store of random features, and for each row the open file and the place of its bytes."""
    key = FeatureKey("", -2, PIXELS, {}, views=1, records="")
    store = create_store(folder, key, ROWS, PATCHES, DIM)
    generator = torch.Generator().manual_seed(0)
    write_shards(
        store,
        lambda asked: (torch.zeros(len(rows), 3, 2, 2) for rows in asked),
        lambda pixels: torch.randn(len(pixels), PATCHES, DIM, generator=generator),
    )
    files = [os.open(store.shard_path(number), os.O_RDONLY) for number in range(store.shards)]
    starts = [8 + int.from_bytes(os.pread(file, 8, 0), "little") for file in files]
    size = store.header["rows_per_shard"]
    return store, [(files[row // size], starts[row // size] + row % size * store.row_bytes) for row in range(ROWS)]


def read_store(store: FeatureStore, order: np.ndarray) -> float:
    """Seconds to read every row, in batches."""
    batch = torch.empty(BATCH, PATCHES, DIM, dtype=torch.bfloat16)
    start = time.perf_counter()
    for number, row in enumerate(order.tolist()):
        batch[number % BATCH] = store.read(row)
    return time.perf_counter() - start


def opened_anew(store: FeatureStore) -> FeatureStore:
    """The store as a process has it that has read nothing yet."""
    return FeatureStore(store.folder, store.header)


def plain_read(places: list[tuple[int, int]], order: np.ndarray) -> float:
    """Seconds to read the same bytes from the same files, and put each row into a batch."""
    batch = np.empty((BATCH, PATCHES * DIM), dtype=np.int16)
    start = time.perf_counter()
    for number, row in enumerate(order.tolist()):
        file, place = places[row]
        batch[number % BATCH] = np.frombuffer(os.pread(file, batch[0].nbytes, place), dtype=np.int16)
    return time.perf_counter() - start


def read_in_place(places: list[tuple[int, int]], order: np.ndarray) -> float:
    """The same straight into the batch: the least that reading can take."""
    batch = np.empty((BATCH, PATCHES * DIM), dtype=np.int16)
    start = time.perf_counter()
    for number, row in enumerate(order.tolist()):
        file, place = places[row]
        os.preadv(file, [batch[number % BATCH].data], place)
    return time.perf_counter() - start
