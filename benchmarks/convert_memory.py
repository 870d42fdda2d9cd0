"""Peak memory of converting a checkpoint of several GB: Hugging Face's BLIP-2 OPT-2.7B at full size, random, both ways.

`python benchmarks/convert_memory.py --output DIR` writes DIR/convert_memory.json; DIR needs three times the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

from qformers.models.tensors import Tensors, write_shards

GB = 10**9
CHILD = """
import sys, time
from qformers.convert.run import convert
start = time.perf_counter()
convert(*sys.argv[1:4])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, time.perf_counter() - start)
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder of the checkpoints and the result"
    )
    parser.add_argument("--shard_gb", type=float, default=2.0, help="size of the checkpoint's shards")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    options = parser.parse_args()
    folder = options.output / "convert_memory"
    shutil.rmtree(folder, ignore_errors=True)
    generate(folder / "theirs", getattr(torch, options.dtype), int(options.shard_gb * GB))
    result: dict[str, object] = {"dtype": options.dtype}
    for source, target, to in (("theirs", "ours", "qformers"), ("ours", "again", "hf")):
        sizes = [file.stat().st_size for file in (folder / source).rglob("*.safetensors")]
        line = [sys.executable, "-c", CHILD, str(folder / source), str(folder / target), to]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        peak, seconds = map(float, done.stdout.split())
        limit = 1.3 * max(sizes) + GB
        result[f"to_{to}"] = {
            "checkpoint_gb": sum(sizes) / GB,
            "largest_shard_gb": max(sizes) / GB,
            "peak_gb": peak / GB,
            "limit_gb": limit / GB,
            "seconds": seconds,
        }
        print(f"{source} to {target}: peak {peak / GB:.2f} GB of at most {limit / GB:.2f} GB, {seconds:.0f} s")
        if peak > limit:
            raise SystemExit(f"converting to {to} took {peak / GB:.2f} GB")
    shutil.rmtree(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "convert_memory.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def generate(folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """The checkpoint, shard by shard, since it need not fit into memory either."""
    folder.mkdir(parents=True)
    text = OPTConfig(vocab_size=50304, hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
                     word_embed_proj_dim=2560, eos_token_id=50118)  # fmt: skip
    config = Blip2Config(text_config=text, image_token_index=50265, architectures=["Blip2ForConditionalGeneration"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    tied = "language_model.lm_head.weight"
    described = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name != tied}

    def random(name: str) -> Tensor:
        return torch.empty(described[name].shape, dtype=dtype).uniform_(-0.02, 0.02)

    start = time.perf_counter()
    write_shards(Tensors(described, random), folder, "generating the checkpoint", shard_bytes=shard_bytes)
    size, seconds = sum(file.stat().st_size for file in folder.iterdir()), time.perf_counter() - start
    print(f"generated {size / GB:.1f} GB in {seconds:.0f} s")


if __name__ == "__main__":
    main()
