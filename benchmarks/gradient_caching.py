"""Peak memory of a stage-1 step over batches of any size: whole, and in micro-batches by gradient caching.

`python benchmarks/gradient_caching.py --output DIR` writes DIR/gradient_caching.json and .png. Each step runs in a
process of its own, on a CPU, with freed memory given back; counted is what the step adds to the model and the
batch. The limit for gradient caching: 1.3 x (what one whole micro-batch adds + the batch's features for ITC).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from qformers.data.batch import Batch
from qformers.models.config import ModelConfig
from qformers.models.presets import QFormerShape, build_stage1
from qformers.models.vision import VisionEncoder
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.output import count_passes
from qformers.objectives.stage1 import Stage1Objective

MB, LIMIT = 10**6, 1.3
VISION_DIM, PATCHES, VOCABULARY, TOKENS, QUERIES, EMBED_DIM = 384, 50, 8000, 10, 8, 256
# A small one: the features and similarities of the whole batch then weigh most beside a micro-batch.
SHAPE = QFormerShape(layers=2, dim=192, heads=6, ffn_dim=768)
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(2**22), "MALLOC_TRIM_THRESHOLD_": str(2**27), "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results")
    parser.add_argument("--micro", type=int, default=64, help="pairs of a micro-batch")
    parser.add_argument("--whole", type=int, nargs="*", default=[128, 256], help="batches also measured whole")
    parser.add_argument("--cached", type=int, nargs="*", default=[128, 256, 1024], help="batches in micro-batches")
    parser.add_argument("--step", type=int, nargs=2, help=argparse.SUPPRESS)  # what the child does
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(*options.step)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    whole = {batch: measure(batch, batch) for batch in [options.micro, *options.whole]}
    cached = {batch: measure(batch, options.micro) for batch in options.cached}
    rows = []
    for batch, peak in cached.items():
        features = batch * (QUERIES + 1) * EMBED_DIM * 4
        rows.append({"batch": batch, "peak_mb": peak / MB, "ratio": peak / (whole[options.micro] + features)})
        print(f"batch {batch} by {options.micro}: {peak / MB:.0f} MB, {rows[-1]['ratio']:.2f} x micro-batch + features")
    result = {
        "micro_batch": options.micro,
        "whole": [{"batch": batch, "peak_mb": peak / MB} for batch, peak in whole.items()],
        "cached": rows,
        "limit": LIMIT,
    }
    (options.output / "gradient_caching.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(whole, cached, options.micro, options.output / "gradient_caching.png")
    if max(row["ratio"] for row in rows) > LIMIT:
        raise SystemExit(f"above {LIMIT} x the micro-batch and the features")


def measure(batch: int, micro_batch: int) -> int:
    """Bytes that one step adds at its peak."""
    line = [sys.executable, __file__, "--step", str(batch), str(micro_batch)]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, **LEAN})
    found = json.loads(done.stdout)
    print(f"batch {batch} by {micro_batch}: {found['bytes'] / MB:.0f} MB in {found['seconds']:.1f} s", file=sys.stderr)
    return found["bytes"]


def step(batch_size: int, micro_batch: int) -> dict[str, float]:
    """One step in this process: forward and backward passes, all gradients."""
    torch.manual_seed(0)
    encoder = VisionEncoder.__new__(VisionEncoder)  # the benchmark starts from the encoder's output
    torch.nn.Module.__init__(encoder)
    encoder.dim = VISION_DIM
    config = ModelConfig(start_from_text_encoder=False, num_queries=QUERIES, embed_dim=EMBED_DIM)
    model = build_stage1(config, VOCABULARY, encoder, SHAPE)
    objective = Stage1Objective(model, Stage1LossConfig()).train()
    batch = Batch(
        input_ids=torch.randint(1000, VOCABULARY - 1, (batch_size, TOKENS)),
        attention_mask=torch.ones(batch_size, TOKENS, dtype=torch.bool),
        image_ids=torch.arange(batch_size),
        names=tuple(map(str, range(batch_size))),
        patch_embeds=torch.randn(batch_size, PATCHES, VISION_DIM),
    )
    for weights in objective.parameters():
        weights.grad = torch.zeros_like(weights)  # they are the model's, whatever the batch
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    count = count_passes([batch], micro_batch)
    for number, arguments in enumerate(objective.passes([batch], micro_batch, seeded)):
        with seeded(number):
            (objective(*arguments).total / count).backward()
    return {"bytes": resident_bytes("VmHWM") - before, "seconds": time.perf_counter() - start}


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Both passes of a micro-batch draw the same dropout."""
    torch.manual_seed(number)
    yield


def resident_bytes(what: str) -> int:
    """A line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def plot(whole: dict[int, int], cached: dict[int, int], micro: int, path: Path) -> None:
    """Peak memory over the size of the batch."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for peaks, label in ((whole, "whole batch"), ({micro: whole[micro], **cached}, f"micro-batches of {micro}")):
        axes.plot(list(peaks), [peak / MB for peak in peaks.values()], marker="o", label=label)
    axes.set(xscale="log", ylim=(0, None), xlabel="pairs that ITC contrasts", ylabel="peak memory of a step, MB")
    axes.set_xticks(sorted({*whole, *cached}), [str(batch) for batch in sorted({*whole, *cached})])
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
