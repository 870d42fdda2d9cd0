"""What both stages have in common: an image encoder, and the Q-Former that reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qformers.models.attention import ImageMemory
from qformers.models.masks import bidirectional_mask
from qformers.models.qformer import QFormer
from qformers.models.vision import VisionEncoder


class ImageReader(nn.Module):
    """Pictures → query outputs. Patch embeddings may come from `vision_encoder` or from a store of features."""

    def __init__(self, vision_encoder: VisionEncoder, vision_norm: nn.LayerNorm, qformer: QFormer) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.vision_norm = vision_norm
        self.qformer = qformer

    def remember(self, patch_embeds: Float[Tensor, "images patches vision_dim"]) -> ImageMemory:
        """Cross-attention keys and values of each image, once, for every pass that will read it.

        `vision_norm` is computed in fp32 (as the authors do). While training, its affine part is folded into the
        weights, so that frozen patches need no gradient; otherwise that would only cost a pass over the weights.
        """
        norm, patches = self.vision_norm, at_least_fp32(patch_embeds)
        if torch.is_grad_enabled():
            normalised = F.layer_norm(patches, norm.normalized_shape, eps=norm.eps)
            return self.qformer.remember(normalised.to(norm.weight.dtype), norm.weight, norm.bias)
        affine = norm.weight.to(patches.dtype), norm.bias.to(patches.dtype)
        normalised = F.layer_norm(patches, norm.normalized_shape, *affine, norm.eps)
        return self.qformer.remember(normalised.to(norm.weight.dtype))

    @torch.no_grad()
    def standardise_patches(self, patch_embeds: Float[Tensor, "images patches vision_dim"]) -> None:
        """Start `vision_norm` from some images: over their patches, each dimension it gives has mean 0 and spread 1.

        An image encoder's outputs are mostly alike: a few dimensions are large in every patch of every image. Read
        as they are, they give each query the same large vector, next to which nothing of the queries is left.
        """
        norm = self.vision_norm
        normalised = F.layer_norm(at_least_fp32(patch_embeds), norm.normalized_shape, eps=norm.eps).flatten(0, 1)
        # A dimension that never changes must not be blown up.
        spread = normalised.std(dim=0).clamp_min(1e-2)
        norm.weight.copy_(1 / spread)
        norm.bias.copy_(-normalised.mean(dim=0) / spread)

    def query(self, memory: ImageMemory) -> Float[Tensor, "images queries dim"]:
        """Query outputs Z of images alone."""
        queries = self.qformer.queries(memory.rows)
        query_outputs, _ = self.qformer(queries, self.qformer.no_text(memory.rows), None, [memory])
        return query_outputs

    def query_with_text(
        self,
        memories: Sequence[ImageMemory],
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows queries dim"]:
        """Query outputs of images while the queries read a text: ITM's pass, and InstructBLIP's.

        `memories` serve the rows in order; queries and text see all of each other.
        """
        query_outputs, _ = self.qformer(
            self.qformer.queries(input_ids.shape[0]),
            self.qformer.text_embeddings(input_ids),
            bidirectional_mask(self.qformer.num_queries, attention_mask),
            memories,
            text_reads=torch.zeros(0, dtype=torch.long, device=input_ids.device),
        )
        return query_outputs


def at_least_fp32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Out of half precision, as features and logits must be before a norm or an exponential; fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
