"""Frozen features beside Hugging Face's encoder, asked for its second-to-last layer: ViT-L/14 with random weights.

Theirs computes the last layer and keeps every layer's output; ours has neither. The same weights, the same features.
`ratio_bf16` is of ours in bfloat16, in which `qformers data features` keeps them, beside theirs in float32.
"""

from __future__ import annotations

import tempfile

import torch
from measure import Result, alternate, flops, machine, peak_bytes, peak_fraction
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from qformers.models.vision import build_vision_encoder
from qformers.training.loop import keep_freed_memory

BATCH, REPETITIONS, TOLERANCE = 8, 3, 1e-5
LARGE = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)


def run() -> Result:
    """Checks that both give the same features, then times them in turn."""
    keep_freed_memory()
    torch.manual_seed(0)
    theirs = CLIPVisionModel(LARGE).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = build_vision_encoder(folder).requires_grad_(False)
    pixels = torch.randn(BATCH, 3, ours.image_px, ours.image_px)

    @torch.inference_mode()
    def own() -> Tensor:
        return ours(pixels)

    @torch.inference_mode()
    def own_in_bf16() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(pixels)

    @torch.inference_mode()
    def peer() -> Tensor:
        return theirs(pixels, output_hidden_states=True).hidden_states[-2]

    expected = peer()
    apart = float((own() - expected).norm() / expected.norm())
    if apart > TOLERANCE:
        raise SystemExit(f"features differ by {apart}, the limit is {TOLERANCE}")
    timed, half = alternate(own, peer, REPETITIONS), alternate(own_in_bf16, peer, REPETITIONS)
    work = flops(own)
    return {
        **timed,
        "ratio_bf16": half["ratio"],
        "memory_ratio": peak_bytes(own) / peak_bytes(peer),
        "flops": work,
        "peer_flops": flops(peer),
        "peak_fraction": peak_fraction(work, timed["cpu_seconds"]["ours"], torch.float32),
        "agreement": apart,
        "agreement_bf16": float((own_in_bf16() - expected).norm() / expected.norm()),
        "batch": BATCH,
        "images_per_second": BATCH / timed["seconds"]["ours"],
        **machine(torch.float32),
    }
