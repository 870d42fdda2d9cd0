"""Re-ranking at full Q-Former size: ITM scores of many pairs, ours against a plain loop over pairs.

The loop does for each pair what the authors' code does: project the image to keys and values, and read a text padded to
35 tokens. `per_image_batch` is their loop with all texts of an image as one batch, the image repeated.

The least work there is: an image's keys and values once, and for each pair what the queries and the real tokens need.
`least_flops` counts that. `memory_ratio` is the peak of our tensors over that of `per_image_batch`. `curves` has the
cost of one image with 1 to 32 texts.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import numpy as np
import torch
from full_size import PATCHES, VISION_DIM, GivenFeatures, captions, stage1_model
from measure import Result, flops, machine, peak_bytes, peak_fraction, spread, timed
from plain_stage1 import plain_match_logits
from torch import Tensor

from qformers.evaluation.scoring import match_logits
from qformers.models.stage1 import Stage1Model

IMAGES, TEXTS_PER_IMAGE, PADDED_TOKENS = 2, 16, 35
REPETITIONS = 3
TOLERANCE = 1e-5


def run() -> Result:
    """Times the loops in turn on the same weights and pairs, and compares their scores."""
    torch.manual_seed(0)
    model = stage1_model(GivenFeatures()).eval().requires_grad_(False)
    texts = IMAGES * TEXTS_PER_IMAGE
    input_ids, attention_mask = captions(texts, padded=PADDED_TOKENS)
    patches = torch.randn(IMAGES, PATCHES, VISION_DIM)
    pairs = (np.repeat(np.arange(IMAGES), TEXTS_PER_IMAGE), np.random.default_rng(0).permutation(texts))

    def ours() -> Tensor:
        return match_logits(model, lambda rows: patches[rows], (input_ids, attention_mask), pairs)

    def per_pair() -> Tensor:
        return plain_loop(model, patches, input_ids, attention_mask, pairs, 1)

    def per_image_batch() -> Tensor:
        return plain_loop(model, patches, input_ids, attention_mask, pairs, TEXTS_PER_IMAGE)

    difference = (ours() - per_pair()).abs().max().item()
    if difference > TOLERANCE:
        raise SystemExit(f"scores differ by {difference}, the limit is {TOLERANCE}")
    names = ("ours", "per_pair", "per_image_batch")
    times = [[timed(loop) for loop in (ours, per_pair, per_image_batch)] for _ in range(REPETITIONS)]
    work, plain_work = flops(ours), flops(per_pair)
    limit = least_flops(model, patches, attention_mask.sum(dim=1))
    return {
        "ratio": spread([row[1][0] / row[0][0] for row in times]),
        "cpu_ratio": spread([row[1][1] / row[0][1] for row in times]),
        "ratio_per_image_batch": spread([row[2][0] / row[0][0] for row in times]),
        "pairs_per_second": {
            name: texts / median(row[column][0] for row in times) for column, name in enumerate(names)
        },
        "memory_ratio": peak_bytes(ours) / peak_bytes(per_image_batch),
        "flops": work,
        "peer_flops": plain_work,
        "least_flops": limit,
        "peak_fraction": peak_fraction(work, median(row[0][1] for row in times), torch.float32),
        "largest_difference": difference,
        "curves": linear_in_pairs(model, patches, input_ids, attention_mask),
        "pairs": texts,
        "texts_per_image": TEXTS_PER_IMAGE,
        **machine(torch.float32),
    }


def linear_in_pairs(model: Stage1Model, patches: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Result:
    """Work and processor time of one image with more and more texts: the image's part is paid once."""
    texts_of_one = (1, 2, 4, 8, 16, 32)
    work, seconds, plain = [], [], []
    for texts in texts_of_one:
        pairs = np.zeros(texts, dtype=np.int64), np.arange(texts)
        ours = partial(match_logits, model, lambda rows: patches[rows], (input_ids, attention_mask), pairs)
        work.append(flops(ours) / 1e9)
        seconds.append(min(timed(ours)[1] for _ in range(REPETITIONS)))
        plain.append(flops(partial(plain_loop, model, patches, input_ids, attention_mask, pairs, texts)) / 1e9)
    return {
        "x": ["texts scored with one image", list(texts_of_one)],
        "GFLOP": {"ours": work, "plain": plain},
        "processor seconds": {"ours": seconds},
    }


def plain_loop(
    model: Stage1Model,
    patches: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    pairs: tuple[np.ndarray, np.ndarray],
    at_once: int,
) -> Tensor:
    """Scores of `pairs`, `at_once` texts of one image in each call."""
    images, texts = (torch.from_numpy(indices).split(at_once) for indices in pairs)
    return torch.cat(
        [
            plain_match_logits(model, patches[image[:1]], input_ids[text], attention_mask[text])
            for image, text in zip(images, texts, strict=True)
        ]
    )


def least_flops(model: Stage1Model, patches: Tensor, lengths: Tensor) -> int:
    """Each image projected once, each text at its own length with nothing that is not read."""
    memory = model.remember(patches[:1])
    work = len(patches) * flops(lambda: model.remember(patches[:1]))
    for length, count in zip(*torch.unique(lengths, return_counts=True), strict=True):
        ids, mask = torch.full((1, int(length)), 1000), torch.ones(1, int(length), dtype=torch.bool)
        work += int(count) * flops(lambda: model.match_logits([memory], ids, mask))  # noqa: B023, called at once
    return work
