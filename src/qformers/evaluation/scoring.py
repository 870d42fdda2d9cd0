"""Pictures and texts through a stage-1 model in batches: ITC features, ITM scores. No gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.models.stage1 import Stage1Model
from qformers.objectives.itc import max_over_queries

TextBatch = tuple[Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]
Encode = Callable[[list[str]], TextBatch]
Pairs = tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]  # image indices, text indices
PatchesOf = Callable[[list[int]], Float[Tensor, "images patches vision_dim"]]
IMAGES_AT_ONCE = 16  # keys and values of one image at full size are 10 MB
PAIRS_AT_ONCE = 64


@torch.inference_mode()
def image_features(
    model: Stage1Model, patch_batches: Iterable[Float[Tensor, "batch patches vision_dim"]]
) -> Float[Tensor, "images queries embed_dim"]:
    """ITC features of all images, on the CPU."""
    return torch.cat([model.encode_image(patches).image_features.cpu() for patches in patch_batches])


@torch.inference_mode()
def text_features(
    model: Stage1Model, encode: Encode, texts: Sequence[str], batch_size: int = 128
) -> Float[Tensor, "texts embed_dim"]:
    """ITC features of all texts, on the CPU, computed in order of length so that little is padding."""
    device = model.temperature.device
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = []
    for start in range(0, len(order), batch_size):
        input_ids, attention_mask = encode([texts[index] for index in order[start : start + batch_size]])
        parts.append(model.encode_text(input_ids.to(device), attention_mask.to(device)).cpu())
    return torch.cat(parts)[torch.tensor(np.argsort(order))]


def itc_similarities(
    images: Float[Tensor, "images queries embed_dim"], texts: Float[Tensor, "texts embed_dim"], rows: int = 64
) -> Float[Tensor, "images texts"]:
    """Cosine similarities, max over the queries, `rows` images at a time so that memory stays bounded."""
    return torch.cat([max_over_queries(part, texts) for part in images.split(rows)])


def match_logits(model: Stage1Model, patches_of: PatchesOf, texts: TextBatch, pairs: Pairs) -> Float[Tensor, "pairs 2"]:
    """ITM logits of (image index, text index) pairs, on the CPU. Pairs in order of images take the least work."""
    parts = [logits for _, logits in match_parts(model, patches_of, texts, pairs)]
    return torch.cat([torch.empty(0, 2), *parts])


def match_parts(
    model: Stage1Model, patches_of: PatchesOf, texts: TextBatch, pairs: Pairs
) -> Iterator[tuple[int, Float[Tensor, "part 2"]]]:
    """`match_logits` of consecutive parts of the pairs, and how many pairs are then done: at most IMAGES_AT_ONCE
    images each.

    Memory is bounded by the part, whatever the number of pairs. An image's keys and values are computed once
    per part; pairs of the part are batched by length over its images, so that hardly anything is padding.
    """
    images, chosen = pairs
    runs = np.flatnonzero(np.diff(images, prepend=-1))  # where another image begins
    bounds = [*runs[::IMAGES_AT_ONCE], len(images)]
    for start, stop in itertools.pairwise(bounds):
        yield int(stop), _match_part(model, patches_of, texts, (images[start:stop], chosen[start:stop]))


@torch.inference_mode()
def _match_part(model: Stage1Model, patches_of: PatchesOf, texts: TextBatch, pairs: Pairs) -> Float[Tensor, "part 2"]:
    device = model.temperature.device
    distinct, rows = np.unique(pairs[0], return_inverse=True)
    memory = model.remember(patches_of([int(image) for image in distinct]).to(device))
    input_ids, attention_mask = (part[torch.from_numpy(pairs[1])] for part in texts)
    lengths = attention_mask.sum(dim=1)
    by_length = np.lexsort((rows, lengths.numpy()))
    logits = torch.empty(len(rows), 2)
    for batch in np.array_split(by_length, -(-len(by_length) // PAIRS_AT_ONCE)):
        batch = batch[np.argsort(rows[batch], kind="stable")]
        ids, mask = (part[batch, : int(lengths[batch].max())].to(device) for part in (input_ids, attention_mask))
        shown, counts = np.unique(rows[batch], return_counts=True)
        memories = [memory.one(int(row)).shared_by(int(count)) for row, count in zip(shown, counts, strict=True)]
        logits[batch] = model.match_logits(memories, ids, mask).float().cpu()
    return logits
