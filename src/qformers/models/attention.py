"""The two attentions of a Q-Former block, and the image memory that cross-attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageMemory:
    """Cross-attention keys and values of some images, one pair per cross-attending block.

    Computed once per image and read by every pass that looks at it. `rows_per_image` consecutive rows of a
    forward pass read the same image; they meet its keys on the query axis, so nothing is copied for them.
    """

    keys: tuple[Float[Tensor, "images heads patches head_dim"], ...]
    values: tuple[Float[Tensor, "images heads patches head_dim"], ...]
    rows_per_image: int = 1

    @property
    def rows(self) -> int:
        """Rows of a forward pass that this memory serves."""
        return self.keys[0].shape[0] * self.rows_per_image

    def shared_by(self, rows_per_image: int) -> ImageMemory:
        """The same images, each read by `rows_per_image` consecutive rows."""
        return replace(self, rows_per_image=rows_per_image)

    def first(self, images: int) -> ImageMemory:
        """The memory of the first so many images (a view, not a copy)."""
        if images == self.keys[0].shape[0]:
            return self
        return ImageMemory(
            keys=tuple(key[:images] for key in self.keys), values=tuple(value[:images] for value in self.values)
        )

    def one(self, image: int) -> ImageMemory:
        """The memory of a single image (a view, not a copy)."""
        return ImageMemory(
            keys=tuple(key[image : image + 1] for key in self.keys),
            values=tuple(value[image : image + 1] for value in self.values),
        )

    def select(self, images: Int[Tensor, " selected"]) -> ImageMemory:
        """The memory of the chosen images, copied (an image may be chosen more than once)."""
        return ImageMemory(
            keys=tuple(key.index_select(0, images) for key in self.keys),
            values=tuple(value.index_select(0, images) for value in self.values),
        )


class SelfAttention(nn.Module):
    """Self-attention over [queries ; text] whose weights both transformers share."""

    def __init__(self, dim: int, heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        hidden: Float[Tensor, "rows length dim"],
        mask: Bool[Tensor, "masks 1 length length"] | None,
        reads: Int[Tensor, " reads"] | None,
    ) -> Float[Tensor, "rows outputs dim"]:
        """Attend over `hidden`; with `reads`, compute only those positions' outputs (keys stay complete)."""
        if reads is None:
            query, key, value = rearrange(
                self.qkv(hidden),
                "rows length (three heads d) -> three rows heads length d",
                three=3,
                heads=self.heads,
            ).unbind(0)
        else:
            dim = hidden.shape[-1]
            query_weight, kv_weight = self.qkv.weight.split([dim, 2 * dim])
            query_bias, kv_bias = self.qkv.bias.split([dim, 2 * dim])
            query = split_heads(F.linear(hidden.index_select(1, reads), query_weight, query_bias), self.heads)
            key, value = rearrange(
                F.linear(hidden, kv_weight, kv_bias),
                "rows length (two heads d) -> two rows heads length d",
                two=2,
                heads=self.heads,
            ).unbind(0)
            mask = None if mask is None else mask.index_select(2, reads)
        dropout = self.attention_dropout if self.training else 0.0
        attended = attend(query, key, value, mask, dropout)
        return self.out(merge_heads(attended))


class CrossAttention(nn.Module):
    """Queries read the image. Keys and values come ready-made in an `ImageMemory`."""

    def __init__(self, dim: int, vision_dim: int, heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(dim, dim)
        self.kv = nn.Linear(vision_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def keys_values(
        self,
        patches: Float[Tensor, "images patches vision_dim"],
        scale: Float[Tensor, " vision_dim"] | None,
        shift: Float[Tensor, " vision_dim"] | None,
    ) -> tuple[Float[Tensor, "images heads patches head_dim"], Float[Tensor, "images heads patches head_dim"]]:
        """Keys and values of `patches * scale + shift`, the affine map folded into the weights.

        Folding it costs two products of the weights' size and saves the gradient with respect to the patches,
        which frozen features do not need.
        """
        weight, bias = self.kv.weight, self.kv.bias
        if scale is not None and shift is not None:
            weight, bias = weight * scale, torch.mv(weight, shift) + bias
        key, value = rearrange(
            F.linear(patches, weight, bias),
            "images patches (two heads d) -> two images heads patches d",
            two=2,
            heads=self.heads,
        ).unbind(0)
        return key, value

    def forward(
        self,
        queries: Float[Tensor, "rows queries dim"],
        memories: Sequence[tuple[Tensor, Tensor, int]],
    ) -> Float[Tensor, "rows queries dim"]:
        """Attend to `memories`: (keys, values, rows per image) triples that serve the rows in order."""
        dropout = self.attention_dropout if self.training else 0.0
        query = split_heads(self.query(queries), self.heads)
        parts = query.split([key.shape[0] * shared for key, _, shared in memories])
        attended = []
        for part, (key, value, shared) in zip(parts, memories, strict=True):
            together = rearrange(part, "(images shared) heads q d -> images heads (shared q) d", shared=shared)
            read = attend(together, key, value, None, dropout)
            attended.append(rearrange(read, "images heads (shared q) d -> (images shared) q (heads d)", shared=shared))
        return self.out(torch.cat(attended))


def attend(
    query: Float[Tensor, "rows heads reads d"],
    key: Float[Tensor, "rows heads length d"],
    value: Float[Tensor, "rows heads length d"],
    mask: Bool[Tensor, "masks 1 reads length"] | None,
    dropout: float,
) -> Float[Tensor, "rows heads reads d"]:
    """Scaled dot-product attention (True in `mask` = may attend).

    On a CPU, in half precision and with a backward pass to come, it is two plain products: the backward pass of
    PyTorch's fused kernel takes five to twelve times as long there at a Q-Former's lengths (docs/speed.md).
    """
    if query.device.type == "cpu" and query.dtype != torch.float32 and query.requires_grad:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def split_heads(hidden: Float[Tensor, "rows length dim"], heads: int) -> Float[Tensor, "rows heads length d"]:
    """Give every head its own axis."""
    return rearrange(hidden, "rows length (heads d) -> rows heads length d", heads=heads)


def merge_heads(attended: Float[Tensor, "rows heads length d"]) -> Float[Tensor, "rows length dim"]:
    """The inverse of `split_heads`."""
    return rearrange(attended, "rows heads length d -> rows length (heads d)")
