"""Re-ranking at full Q-Former size: ITM scores of many pairs, ours against a plain loop over pairs.

The loop does for each pair what the authors' code does: project the image to keys and values, and read a text padded to
35 tokens. `per_image_batch` is their loop with all texts of an image as one batch, the image repeated.

The least work there is: an image's keys and values once, and for each pair what the queries and the real tokens need.
`flops.limit_ratio` is the plain loop's products over that; `peak_fraction` is our rate over the rate of one large
product measured here. `memory_ratio` is the peak of our tensors over that of `per_image_batch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from plain_stage1 import plain_match_logits
from stage1_step import PATCHES, VISION_DIM, VOCABULARY, GivenFeatures, flops
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qformers.evaluation.scoring import match_logits
from qformers.models.config import ModelConfig
from qformers.models.presets import build_stage1
from qformers.models.stage1 import Stage1Model

IMAGES, TEXTS_PER_IMAGE, PADDED_TOKENS = 2, 16, 35
REPETITIONS = 3
TOLERANCE = 1e-5


def run() -> dict[str, object]:
    """Times the loops in turn on the same weights and pairs, and compares their scores."""
    torch.manual_seed(0)
    config = ModelConfig(start_from_text_encoder=False, dropout=0.0, attention_dropout=0.0)
    model = build_stage1(config, VOCABULARY, GivenFeatures()).eval().requires_grad_(False)
    texts = IMAGES * TEXTS_PER_IMAGE
    lengths = torch.randint(9, 15, (texts,))  # COCO captions, with [CLS] and [SEP]
    input_ids = torch.randint(1000, VOCABULARY - 1, (texts, PADDED_TOKENS))
    attention_mask = torch.arange(PADDED_TOKENS)[None, :] < lengths[:, None]
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
    times = [[seconds(loop) for loop in (ours, per_pair, per_image_batch)] for _ in range(REPETITIONS)]
    ratios, batch_ratios = ([row[column] / row[0] for row in times] for column in (1, 2))
    own_seconds = median(row[0] for row in times)
    work, plain_work = flops(ours), flops(per_pair)
    limit = least_flops(model, patches, lengths)
    return {
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "ratio_per_image_batch": {"median": median(batch_ratios), "min": min(batch_ratios), "max": max(batch_ratios)},
        "pairs_per_second": {name: texts / median(row[column] for row in times) for column, name in enumerate(names)},
        "memory_ratio": peak_bytes(ours) / peak_bytes(per_image_batch),
        "flops": {
            "ours": work,
            "plain": plain_work,
            "least": limit,
            "ratio": plain_work / work,
            "limit_ratio": plain_work / limit,
        },
        "peak_fraction": work / own_seconds / peak_flops_per_second(),
        "largest_difference": difference,
        "pairs": texts,
        "texts_per_image": TEXTS_PER_IMAGE,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dtype": "float32",
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


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)
        }
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


def peak_bytes(loop: Callable[[], Tensor]) -> int:
    """Of all tensors that `loop` makes."""
    with PeakBytes() as counted:
        loop()
    return counted.peak


def seconds(loop: Callable[[], Tensor]) -> float:
    """How long `loop` takes."""
    start = time.perf_counter()
    loop()
    return time.perf_counter() - start


def peak_flops_per_second(side: int = 2048) -> float:
    """Products and sums a second of one large matrix product, the best of three."""
    left, right = torch.randn(2, side, side)
    torch.mm(left, right)
    return 2 * side**3 / min(seconds(lambda: torch.mm(left, right)) for _ in range(3))
