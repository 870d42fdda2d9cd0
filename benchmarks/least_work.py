"""The least matrix work of a stage-1 step as counted by hand; docs/speed.md tells the derivation in words."""

from __future__ import annotations

from collections.abc import Iterable

from full_size import PATCHES, VISION_DIM, VOCABULARY

LAYERS, DIM, FFN, QUERIES, EMBED_DIM, CROSS_LAYERS = 12, 768, 3072, 32, 256, 6
TRAINED, FROZEN_INPUT = 3, 2  # a product, and its gradients: of weight and input, or of the weight alone


def stage1_least_flops(lengths: Iterable[int]) -> int:
    """Products and sums of forward and backward passes over one image and one caption for each of `lengths`.

    Nothing is padded, nothing computed twice and nothing that no loss reads; every pair of tokens that may not see each
    other is left out.
    """
    return sum(_image(length) for length in lengths)


def _image(tokens: int) -> int:
    """One image, its caption of `tokens`, and its three pairs of ITM (its own negatives are as long on average)."""
    memory = CROSS_LAYERS * 2 * PATCHES * VISION_DIM * 2 * DIM
    # ITC's image pass is ITG's too: 32 queries, the caption for ITC, the caption for ITG.
    unimodal = _blocks(
        QUERIES + 2 * tokens,
        QUERIES,
        QUERIES**2 + tokens**2 + tokens * QUERIES + tokens * (tokens + 1) // 2,
        read=QUERIES + 1 + (tokens - 1),
    )
    # Of ITM's last block only the queries are read.
    matching = 3 * _blocks(QUERIES + tokens, QUERIES, (QUERIES + tokens) ** 2, read=QUERIES)
    heads = 2 * (QUERIES + 1) * DIM * EMBED_DIM + 3 * 2 * DIM * 2
    words = (tokens - 1) * 2 * DIM * (DIM + VOCABULARY)
    return FROZEN_INPUT * memory + TRAINED * (unimodal + matching + heads + words)


def _blocks(length: int, queries: int, visible: int, read: int) -> int:
    """All blocks over one row: `visible` pairs of tokens see each other, the last block's outputs are `read`."""
    keys, outputs = 2 * DIM * 2 * DIM, 2 * DIM * 2 * DIM + 2 * 2 * DIM * FFN
    seen = 2 * 2 * DIM * visible
    cross = queries * (2 * 2 * DIM * DIM + 2 * 2 * DIM * PATCHES)
    last = length * keys + read * outputs + seen * read // length
    return (LAYERS - 1) * (length * (keys + outputs) + seen) + last + CROSS_LAYERS * cross
