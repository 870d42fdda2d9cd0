"""What else can stand between a frozen image encoder and a frozen language model: the Q-Former's critics' proposals.

Each gives `num_queries` vectors a picture, as many as a Q-Former would, and `language_projection` follows, so that what
is compared is the bridge alone. None reads text, so none can be steered by a question, and none has a stage 1.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from qformers.errors import ConfigError
from qformers.models.attention import CrossAttention
from qformers.models.qformer import FeedForward


class AveragePooling(nn.Module):
    """The means of `num_queries` equal rectangles of the grid of patches: `bridge: linear`.

    With `language_projection` behind it this is a linear projection of pooled patches. [CLS] is left out. The
    rectangles are as near to squares as `num_queries` allows: 32 are 4 rows of 8.

    Raises:
        ConfigError: the grid has fewer rows or columns of patches than rectangles.
    """

    def __init__(self, num_queries: int, vision_dim: int, prefix_tokens: int, grid: int) -> None:
        super().__init__()
        rows = max(number for number in range(1, math.isqrt(num_queries) + 1) if num_queries % number == 0)
        self.shape = (rows, num_queries // rows)
        self.prefix_tokens = prefix_tokens
        self.grid = grid
        self.dim = vision_dim
        if self.shape[1] > grid:
            raise ConfigError(
                f"num_queries is {num_queries}, {self.shape[0]} × {self.shape[1]} rectangles, and the image encoder "
                f"gives {grid} × {grid} patches: choose fewer, or a number with nearer factors"
            )

    def forward(self, patches: Float[Tensor, "images patches vision_dim"]) -> Float[Tensor, "images queries dim"]:
        grid = rearrange(patches[:, self.prefix_tokens :], "images (y x) dim -> images dim y x", y=self.grid)
        return rearrange(F.adaptive_avg_pool2d(grid, self.shape), "images dim y x -> images (y x) dim")


class PooledMLP(nn.Module):
    """Average pooling, then LLaVA-1.5's projector: `bridge: mlp`.

    Two linear layers with GELU between (arXiv 2310.03744, section 3.2), of which `language_projection` is the second,
    behind pooling instead of a Q-Former (DeCo, arXiv 2405.20985). It is as wide as the language model.
    """

    def __init__(self, pooling: AveragePooling, dim: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.up = nn.Linear(pooling.dim, dim)
        self.dim = dim

    def forward(self, patches: Float[Tensor, "images patches vision_dim"]) -> Float[Tensor, "images queries dim"]:
        return F.gelu(self.up(self.pooling(patches)))


class PerceiverLayer(nn.Module):
    """Latents attend to [patches ; latents], then a feed-forward layer, with LayerNorms before (Flamingo, A.1.1)."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.patches_norm = nn.LayerNorm(dim)
        self.latents_norm = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, heads, attention_dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, latents: Float[Tensor, "images queries dim"], patches: Float[Tensor, "images patches dim"]
    ) -> Float[Tensor, "images queries dim"]:
        asking = self.latents_norm(latents)
        key, value = self.attention.keys_values(torch.cat([self.patches_norm(patches), asking], dim=1), None, None)
        latents = latents + self.dropout(self.attention(asking, [(key, value, 1)]))
        return latents + self.dropout(self.ffn(self.ffn_norm(latents)))


class PerceiverResampler(nn.Module):
    """Flamingo's resampler (arXiv 2204.14198, section 3.1.1): learned latents read the patches in every layer.

    Unlike a Q-Former it has no text beside its latents and no pretraining. `bridge: perceiver`.
    """

    def __init__(self, query_tokens: nn.Parameter, patches_in: nn.Linear, layers: nn.ModuleList) -> None:
        super().__init__()
        self.query_tokens = query_tokens
        self.patches_in = patches_in
        self.layers = layers
        self.out_norm = nn.LayerNorm(query_tokens.shape[1])
        self.dim = query_tokens.shape[1]

    def forward(self, patches: Float[Tensor, "images patches vision_dim"]) -> Float[Tensor, "images queries dim"]:
        latents, read = self.query_tokens.expand(len(patches), -1, -1), self.patches_in(patches)
        for layer in self.layers:
            latents = cast(PerceiverLayer, layer)(latents, read)
        return self.out_norm(latents)


Bridge = AveragePooling | PooledMLP | PerceiverResampler
