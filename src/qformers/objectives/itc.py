"""Image-text contrastive learning (BLIP-2, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.distributed import gather_with_gradient, process_offset


def max_over_queries(
    image_features: Float[Tensor, "images queries embed_dim"], text_features: Float[Tensor, "texts embed_dim"]
) -> Float[Tensor, "images texts"]:
    """Similarity of each pair: the largest cosine between the text and any of the image's queries."""
    # In fp32 even under autocast: over a temperature of 0.07, bf16's steps of 1/256 are 1/18 of a logit.
    with torch.autocast(image_features.device.type, enabled=False):
        cosines = einsum(
            image_features,
            text_features,
            "images queries embed_dim, texts embed_dim -> images texts queries",
        )
    return cosines.amax(dim=-1)


def similarities(
    image_features: Float[Tensor, "batch queries embed_dim"], text_features: Float[Tensor, "batch embed_dim"]
) -> tuple[Float[Tensor, "batch global_batch"], Float[Tensor, "batch global_batch"]]:
    """`sim_i2t` and `sim_t2i` of this process's rows against the global batch, before the temperature.

    The gathered features carry gradient (the authors' do not, and lose about half of it).
    """
    all_images = gather_with_gradient(image_features)
    all_texts = gather_with_gradient(text_features)
    sim_i2t = max_over_queries(image_features, all_texts)
    # On one process the second matrix is the first one transposed, so it need not be computed again.
    sim_t2i = sim_i2t.T if all_images is image_features else max_over_queries(all_images, text_features).T
    return sim_i2t, sim_t2i


def itc_loss(
    sim_i2t: Float[Tensor, "batch global_batch"],
    sim_t2i: Float[Tensor, "batch global_batch"],
    temperature: Float[Tensor, ""],
    same_image: Bool[Tensor, "batch global_batch"],
    label_smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean of the image-to-text and text-to-image cross-entropies.

    Args:
        same_image: True where row and column show the same image, which spreads the target evenly over all
            of an image's captions; True only for a row's own caption when image ids are not used.
        label_smoothing: 0.1 in the authors' code.
    """
    captions = same_image.sum(dim=1, keepdim=True)
    targets = same_image.to(sim_i2t.dtype) / captions
    i2t = F.cross_entropy(sim_i2t / temperature, targets, label_smoothing=label_smoothing)
    t2i = F.cross_entropy(sim_t2i / temperature, targets, label_smoothing=label_smoothing)
    return (i2t + t2i) / 2


def same_image_matrix(image_ids: Int[Tensor, " batch"]) -> Bool[Tensor, "batch global_batch"]:
    """True where this process's row and the global batch's column show the same image."""
    everyone = gather_with_gradient(image_ids)
    return image_ids[:, None] == everyone[None, :]


def own_caption_matrix(image_ids: Int[Tensor, " batch"]) -> Bool[Tensor, "batch global_batch"]:
    """True only where row and column are the same pair: every other caption is a negative."""
    everyone = gather_with_gradient(image_ids)
    rows = torch.arange(len(image_ids), device=image_ids.device) + process_offset(len(image_ids))
    return rows[:, None] == torch.arange(len(everyone), device=image_ids.device)[None, :]
