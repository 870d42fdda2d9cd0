"""Where the queries look: the cross-attention weights that the fused attention never writes down."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qformers.models.attention import CrossAttention, split_heads
from qformers.models.reader import ImageReader


@torch.inference_mode()
def cross_attention_weights(
    model: ImageReader,
    patch_embeds: Float[Tensor, "1 patches vision_dim"],
    text: tuple[Int[Tensor, "1 tokens"], Bool[Tensor, "1 tokens"]] | None = None,
) -> Float[Tensor, "layers queries patches"]:
    """Attention of each query over the patches, mean over the heads, in each cross-attending block.

    Args:
        text: input ids and mask that the queries read at the same time, as in ITM and VQA; None: queries alone.
    """
    weights: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, CrossAttention)
        queries, [(key, _, _)] = inputs
        query = split_heads(module.query(queries), module.heads)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights.append(scores.softmax(dim=-1).mean(dim=1)[0])

    hooks = [
        module.register_forward_pre_hook(record)
        for module in model.qformer.modules()
        if isinstance(module, CrossAttention)
    ]
    try:
        memory = model.remember(patch_embeds)
        if text is None:
            model.query(memory)
        else:
            model.query_with_text([memory], *text)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)
