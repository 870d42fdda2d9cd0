"""Attention forward and backward in bf16 on a CPU: `attend` against PyTorch's fused kernel, at a Q-Former's lengths."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from qformers.models.attention import attend

REPETITIONS = 5
# rows, heads, reads, length, head_dim: the demo's and BLIP-2's cross-attention, and self-attention over a caption.
SHAPES = {
    "8 queries read 82 patches": (128, 12, 8, 82, 32),
    "32 queries read 257 patches": (16, 12, 32, 257, 64),
    "14 tokens": (128, 12, 14, 14, 32),
    "32 tokens": (16, 12, 32, 32, 64),
}


def run() -> dict[str, object]:
    """Times both in turn on the same tensors; the ratio is the median over shapes and repetitions."""
    torch.manual_seed(0)
    by_shape: dict[str, list[float]] = {}
    for name, (rows, heads, reads, length, head_dim) in SHAPES.items():
        inputs = [
            torch.randn(rows, heads, size, head_dim, dtype=torch.bfloat16).requires_grad_()
            for size in (reads, length, length)
        ]
        for repetition in range(REPETITIONS + 1):
            own = seconds(lambda inputs=inputs: attend(*inputs, None, 0.0))
            peer = seconds(lambda inputs=inputs: F.scaled_dot_product_attention(*inputs))
            if repetition:
                by_shape.setdefault(name, []).append(peer / own)
    ratios = [ratio for values in by_shape.values() for ratio in values]
    return {
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "by_shape": {name: median(values) for name, values in by_shape.items()},
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dtype": "bfloat16",
    }


def seconds(attention: Callable[[], Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    attention().sum().backward()
    return time.perf_counter() - start
