"""Hugging Face's BLIP-2 weights in ours, for the parity tests."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from qformers.models.qformer import QFormer

TOY_VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

# Ours → Hugging Face's, within one block; several are concatenated.
BLOCK_KEYS = {
    "self_attention.qkv": [
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ],
    "self_attention.out": ["attention.output.dense"],
    "self_attention_norm": ["attention.output.LayerNorm"],
    "cross_attention.query": ["crossattention.attention.query"],
    "cross_attention.kv": ["crossattention.attention.key", "crossattention.attention.value"],
    "cross_attention.out": ["crossattention.output.dense"],
    "cross_attention_norm": ["crossattention.output.LayerNorm"],
    "query_ffn.up": ["intermediate_query.dense"],
    "query_ffn.down": ["output_query.dense"],
    "query_ffn_norm": ["output_query.LayerNorm"],
    "text_ffn.up": ["intermediate.dense"],
    "text_ffn.down": ["output.dense"],
    "text_ffn_norm": ["output.LayerNorm"],
}


@torch.no_grad()
def give_weights(
    ours: QFormer, qformer: Blip2QFormerModel, query_tokens: Tensor, embeddings: Blip2TextEmbeddings | None = None
) -> None:
    """Every weight of theirs into its place in ours; fails if one is left over on either side.

    Without `embeddings` they have no text branch, and ours keeps its own.
    """
    theirs = dict(qformer.named_parameters())
    filled = {
        "embedding_norm.weight": theirs.pop("layernorm.weight"),
        "embedding_norm.bias": theirs.pop("layernorm.bias"),
        "query_tokens": query_tokens,
    }
    if embeddings is None:
        filled |= {name: tensor for name, tensor in ours.state_dict().items() if "text_" in name}
    else:
        filled["text_embeddings.word.weight"] = embeddings.word_embeddings.weight
        filled["text_embeddings.position.weight"] = embeddings.position_embeddings.weight
    for number in range(len(ours.blocks)):
        for mine, sources in BLOCK_KEYS.items():
            for kind in ("weight", "bias"):
                keys = [f"encoder.layer.{number}.{source}.{kind}" for source in sources]
                if keys[0] in theirs:
                    filled[f"blocks.{number}.{mine}.{kind}"] = torch.cat([theirs.pop(key) for key in keys])
    assert not theirs, f"left over: {sorted(theirs)}"
    ours.load_state_dict(filled, strict=True, assign=True)
