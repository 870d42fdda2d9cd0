"""Pictures and texts through a stage-1 model in batches: ITC features, ITM scores. No gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.models.stage1 import Stage1Model
from qformers.objectives.itc import max_over_queries

TextBatch = tuple[Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]
Encode = Callable[[list[str]], TextBatch]
PAIRS_AT_ONCE = 256


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


@torch.inference_mode()
def match_logits(
    model: Stage1Model,
    encode: Encode,
    patch_embeds: Callable[[int], Float[Tensor, "1 patches vision_dim"]],
    texts: Sequence[str],
    pairs: tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]],
) -> Float[Tensor, "pairs 2"]:
    """ITM logits of (image index, text index) pairs, sorted by image: an image's keys are computed once."""
    images, chosen = pairs
    device = model.temperature.device
    logits = torch.empty(len(images), 2)
    starts = np.flatnonzero(np.diff(images, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(images)], strict=True):
        memory = model.remember(patch_embeds(int(images[start])).to(device))
        own = np.array(sorted(range(start, stop), key=lambda pair: len(texts[int(chosen[pair])])))
        for part in np.array_split(own, -(-len(own) // PAIRS_AT_ONCE)):
            input_ids, attention_mask = encode([texts[int(chosen[pair])] for pair in part])
            scored = model.match_logits([memory.shared_by(len(part))], input_ids.to(device), attention_mask.to(device))
            logits[torch.from_numpy(part)] = scored.float().cpu()
    return logits
