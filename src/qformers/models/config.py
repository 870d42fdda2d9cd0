"""What a user may choose about a model. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PresetName = Literal["blip2", "small", "tiny"]


@dataclass(frozen=True)
class ModelConfig:
    """One stage-1 model: which frozen encoder it reads, and the shape and start of its Q-Former."""

    vision_encoder: str = "openai/clip-vit-large-patch14"
    """Folder or hub id of the frozen image encoder."""
    vision_layer: int = -2
    """Which layer's output to read; later ones are not built. The paper takes the second-to-last."""
    preset: PresetName = "blip2"
    """Shape of the Q-Former: blip2 (BERT-base), small (MiniLM: 6 layers, 384 wide), tiny (tests)."""
    text_encoder: str = "bert-base-uncased"
    """Folder or hub id of the BERT that gives the tokenizer and, with `start_from_text_encoder`, weights."""
    start_from_text_encoder: bool = True
    """False: random weights, for tests of shape and speed."""
    num_queries: int = 32
    """Learned queries, and so visual tokens, per image."""
    cross_attention_frequency: int = 2
    """Blocks 0, n, 2n, … read the image."""
    embed_dim: int = 256
    """Width of the space in which ITC compares images and texts."""
    dropout: float = 0.1
    """On embeddings and on every sub-layer's output, as BERT."""
    attention_dropout: float = 0.1
    """On attention weights, as BERT."""
