"""LAVIS's names and shapes, written down from its classes and apart from the key tables."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def eva_vit(dim: int = 1408, ffn: int = 6144, layers: int = 39, positions: int = 257, patch: int = 14) -> Shapes:
    names: Shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, positions, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(layers):
        block = f"blocks.{i}"
        names |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
        names |= {f"{block}.attn.qkv.weight": (3 * dim, dim)}
        names |= {f"{block}.attn.q_bias": (dim,), f"{block}.attn.v_bias": (dim,)}
        names |= linear(f"{block}.attn.proj", dim, dim)
        names |= linear(f"{block}.mlp.fc1", dim, ffn) | linear(f"{block}.mlp.fc2", ffn, dim)
    return {f"visual_encoder.{name}": shape for name, shape in names.items()}


def clip_vit(dim: int = 1024, layers: int = 23, positions: int = 257, patch: int = 14) -> Shapes:
    names: Shapes = {
        "class_embedding": (dim,),
        "positional_embedding": (positions, dim),
        "conv1.weight": (dim, 3, patch, patch),
        **norm("ln_pre", dim),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        names |= norm(f"{block}.ln_1", dim) | norm(f"{block}.ln_2", dim)
        names |= {f"{block}.attn.in_proj_weight": (3 * dim, dim), f"{block}.attn.in_proj_bias": (3 * dim,)}
        names |= linear(f"{block}.attn.out_proj", dim, dim)
        names |= linear(f"{block}.mlp.c_fc", dim, 4 * dim) | linear(f"{block}.mlp.c_proj", 4 * dim, dim)
    return {f"visual_encoder.{name}": shape for name, shape in names.items()}


def qformer(
    vision_dim: int, text: bool, dim: int = 768, ffn: int = 3072, layers: int = 12, words: int = 30523
) -> Shapes:
    names: Shapes = {
        "query_tokens": (1, 32, dim),
        **norm("ln_vision", vision_dim),
        **norm("Qformer.bert.embeddings.LayerNorm", dim),
        "Qformer.bert.embeddings.position_ids": (1, 512),
    }
    if text:
        names["Qformer.bert.embeddings.word_embeddings.weight"] = (words, dim)
        names["Qformer.bert.embeddings.position_embeddings.weight"] = (512, dim)
    for i in range(layers):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            names |= linear(f"{layer}.attention.self.{part}", dim, dim)
        names |= linear(f"{layer}.attention.output.dense", dim, dim) | norm(f"{layer}.attention.output.LayerNorm", dim)
        if i % 2 == 0:
            names |= linear(f"{layer}.crossattention.self.query", dim, dim)
            names |= linear(f"{layer}.crossattention.self.key", vision_dim, dim)
            names |= linear(f"{layer}.crossattention.self.value", vision_dim, dim)
            names |= linear(f"{layer}.crossattention.output.dense", dim, dim)
            names |= norm(f"{layer}.crossattention.output.LayerNorm", dim)
        for which in ["_query"] + [""] * text:
            names |= linear(f"{layer}.intermediate{which}.dense", dim, ffn)
            names |= linear(f"{layer}.output{which}.dense", ffn, dim) | norm(f"{layer}.output{which}.LayerNorm", dim)
    return names


def stage1_heads(dim: int = 768, embed: int = 256, words: int = 30523) -> Shapes:
    head = "Qformer.cls.predictions"
    return {
        "temp": (),
        **linear("vision_proj", dim, embed),
        **linear("text_proj", dim, embed),
        **linear("itm_head", dim, 2),
        **linear(f"{head}.transform.dense", dim, dim),
        **norm(f"{head}.transform.LayerNorm", dim),
        f"{head}.bias": (words,),
        f"{head}.decoder.weight": (words, dim),
        f"{head}.decoder.bias": (words,),
    }
