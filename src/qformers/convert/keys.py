"""What every weight is called here, in Hugging Face's checkpoints and in the authors' (LAVIS).

The tables are read in both directions: ours on the left, theirs on the right. `{i}` is the number of a layer, `{w}`
is `weight` and `bias`. A tuple is one tensor to the other side, concatenated in this order on the first axis. A row
whose weights a model does not have (a text branch, a head) is passed over; a weight that no row names is an error.

Language models keep Hugging Face's own names on all sides, behind `LANGUAGE_MODEL`.
"""

from __future__ import annotations

Table = dict[str | tuple[str, ...], str | tuple[str, ...]]

LANGUAGE_MODEL = "language_model."

# EVA's attention has a bias of queries and of values and none of keys: zeros here, nothing there. It would change no
# output, since it adds the same to all scores of a query.
NO_KEY_BIAS = "(no key bias)"

# Theirs have a leading axis of one, ours do not.
LEADING_AXIS = frozenset({"qformer.query_tokens"})

# ---- Hugging Face: the image encoder is its own Blip2VisionModel, ours too

_HF_SHARED: Table = {
    "vision_encoder.body.embeddings.class_embedding": "vision_model.embeddings.class_embedding",
    "vision_encoder.body.embeddings.position_embedding": "vision_model.embeddings.position_embedding",
    "vision_encoder.body.embeddings.patch_embedding.{w}": "vision_model.embeddings.patch_embedding.{w}",
    "vision_encoder.body.encoder.layers.{i}.layer_norm1.{w}": "vision_model.encoder.layers.{i}.layer_norm1.{w}",
    "vision_encoder.body.encoder.layers.{i}.self_attn.qkv.{w}": "vision_model.encoder.layers.{i}.self_attn.qkv.{w}",
    "vision_encoder.body.encoder.layers.{i}.self_attn.projection.{w}": (
        "vision_model.encoder.layers.{i}.self_attn.projection.{w}"
    ),
    "vision_encoder.body.encoder.layers.{i}.layer_norm2.{w}": "vision_model.encoder.layers.{i}.layer_norm2.{w}",
    "vision_encoder.body.encoder.layers.{i}.mlp.fc1.{w}": "vision_model.encoder.layers.{i}.mlp.fc1.{w}",
    "vision_encoder.body.encoder.layers.{i}.mlp.fc2.{w}": "vision_model.encoder.layers.{i}.mlp.fc2.{w}",
    "vision_norm.{w}": "vision_model.post_layernorm.{w}",
    "qformer.query_tokens": "query_tokens",
    "qformer.blocks.{i}.self_attention.qkv.{w}": (
        "qformer.encoder.layer.{i}.attention.attention.query.{w}",
        "qformer.encoder.layer.{i}.attention.attention.key.{w}",
        "qformer.encoder.layer.{i}.attention.attention.value.{w}",
    ),
    "qformer.blocks.{i}.self_attention.out.{w}": "qformer.encoder.layer.{i}.attention.output.dense.{w}",
    "qformer.blocks.{i}.self_attention_norm.{w}": "qformer.encoder.layer.{i}.attention.output.LayerNorm.{w}",
    "qformer.blocks.{i}.cross_attention.query.{w}": "qformer.encoder.layer.{i}.crossattention.attention.query.{w}",
    "qformer.blocks.{i}.cross_attention.kv.{w}": (
        "qformer.encoder.layer.{i}.crossattention.attention.key.{w}",
        "qformer.encoder.layer.{i}.crossattention.attention.value.{w}",
    ),
    "qformer.blocks.{i}.cross_attention.out.{w}": "qformer.encoder.layer.{i}.crossattention.output.dense.{w}",
    "qformer.blocks.{i}.cross_attention_norm.{w}": "qformer.encoder.layer.{i}.crossattention.output.LayerNorm.{w}",
    "qformer.blocks.{i}.query_ffn.up.{w}": "qformer.encoder.layer.{i}.intermediate_query.dense.{w}",
    "qformer.blocks.{i}.query_ffn.down.{w}": "qformer.encoder.layer.{i}.output_query.dense.{w}",
    "qformer.blocks.{i}.query_ffn_norm.{w}": "qformer.encoder.layer.{i}.output_query.LayerNorm.{w}",
}
_HF_TEXT_LAYERS: Table = {
    "qformer.blocks.{i}.text_ffn.up.{w}": "qformer.encoder.layer.{i}.intermediate.dense.{w}",
    "qformer.blocks.{i}.text_ffn.down.{w}": "qformer.encoder.layer.{i}.output.dense.{w}",
    "qformer.blocks.{i}.text_ffn_norm.{w}": "qformer.encoder.layer.{i}.output.LayerNorm.{w}",
}

# Blip2ForConditionalGeneration and Blip2Model: no place for a text branch
HF_GENERATION: Table = _HF_SHARED | {
    "qformer.embedding_norm.{w}": "qformer.layernorm.{w}",
    "language_projection.{w}": "language_projection.{w}",
}
# Blip2ForImageTextRetrieval: no place for the temperature and the ITG head
HF_RETRIEVAL: Table = (
    _HF_SHARED
    | _HF_TEXT_LAYERS
    | {
        "qformer.embedding_norm.{w}": "qformer.layernorm.{w}",
        "qformer.text_embeddings.word.weight": "embeddings.word_embeddings.weight",
        "qformer.text_embeddings.position.weight": "embeddings.position_embeddings.weight",
        "vision_projection.{w}": "vision_projection.{w}",
        "text_projection.{w}": "text_projection.{w}",
        "itm_head.{w}": "itm_head.{w}",
    }
)
# InstructBlipForConditionalGeneration: the embeddings' norm belongs to the text branch, which it always has
HF_INSTRUCT: Table = (
    _HF_SHARED
    | _HF_TEXT_LAYERS
    | {
        "qformer.embedding_norm.{w}": "qformer.embeddings.layernorm.{w}",
        "qformer.text_embeddings.word.weight": "qformer.embeddings.word_embeddings.weight",
        "qformer.text_embeddings.position.weight": "qformer.embeddings.position_embeddings.weight",
        "language_projection.{w}": "language_projection.{w}",
    }
)
# 0, 1, 2, …: older releases stored them.
HF_WITHOUT_MEANING = frozenset({"embeddings.position_ids", "qformer.embeddings.position_ids"})

# ---- LAVIS: EVA ViT-g, or CLIP ViT-L with the layers of OpenAI's code

_LAVIS_EVA: Table = {
    "vision_encoder.body.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_encoder.body.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_encoder.body.embeddings.patch_embedding.{w}": "visual_encoder.patch_embed.proj.{w}",
    "vision_encoder.body.encoder.layers.{i}.layer_norm1.{w}": "visual_encoder.blocks.{i}.norm1.{w}",
    "vision_encoder.body.encoder.layers.{i}.self_attn.qkv.weight": "visual_encoder.blocks.{i}.attn.qkv.weight",
    "vision_encoder.body.encoder.layers.{i}.self_attn.qkv.bias": (
        "visual_encoder.blocks.{i}.attn.q_bias",
        NO_KEY_BIAS,
        "visual_encoder.blocks.{i}.attn.v_bias",
    ),
    "vision_encoder.body.encoder.layers.{i}.self_attn.projection.{w}": "visual_encoder.blocks.{i}.attn.proj.{w}",
    "vision_encoder.body.encoder.layers.{i}.layer_norm2.{w}": "visual_encoder.blocks.{i}.norm2.{w}",
    "vision_encoder.body.encoder.layers.{i}.mlp.fc1.{w}": "visual_encoder.blocks.{i}.mlp.fc1.{w}",
    "vision_encoder.body.encoder.layers.{i}.mlp.fc2.{w}": "visual_encoder.blocks.{i}.mlp.fc2.{w}",
}
_LAVIS_CLIP: Table = {
    "vision_encoder.body.embeddings.class_embedding": "visual_encoder.class_embedding",
    "vision_encoder.body.embeddings.position_embedding.weight": "visual_encoder.positional_embedding",
    "vision_encoder.body.embeddings.patch_embedding.weight": "visual_encoder.conv1.weight",
    "vision_encoder.body.pre_norm.{w}": "visual_encoder.ln_pre.{w}",
    "vision_encoder.body.encoder.layers.{i}.layer_norm1.{w}": "visual_encoder.transformer.resblocks.{i}.ln_1.{w}",
    (
        "vision_encoder.body.encoder.layers.{i}.self_attn.q_proj.{w}",
        "vision_encoder.body.encoder.layers.{i}.self_attn.k_proj.{w}",
        "vision_encoder.body.encoder.layers.{i}.self_attn.v_proj.{w}",
    ): "visual_encoder.transformer.resblocks.{i}.attn.in_proj_{w}",
    "vision_encoder.body.encoder.layers.{i}.self_attn.out_proj.{w}": (
        "visual_encoder.transformer.resblocks.{i}.attn.out_proj.{w}"
    ),
    "vision_encoder.body.encoder.layers.{i}.layer_norm2.{w}": "visual_encoder.transformer.resblocks.{i}.ln_2.{w}",
    "vision_encoder.body.encoder.layers.{i}.mlp.fc1.{w}": "visual_encoder.transformer.resblocks.{i}.mlp.c_fc.{w}",
    "vision_encoder.body.encoder.layers.{i}.mlp.fc2.{w}": "visual_encoder.transformer.resblocks.{i}.mlp.c_proj.{w}",
}
_LAVIS_QFORMER: Table = {
    "vision_norm.{w}": "ln_vision.{w}",
    "qformer.query_tokens": "query_tokens",
    "qformer.embedding_norm.{w}": "Qformer.bert.embeddings.LayerNorm.{w}",
    "qformer.text_embeddings.word.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "qformer.text_embeddings.position.weight": "Qformer.bert.embeddings.position_embeddings.weight",
    "qformer.blocks.{i}.self_attention.qkv.{w}": (
        "Qformer.bert.encoder.layer.{i}.attention.self.query.{w}",
        "Qformer.bert.encoder.layer.{i}.attention.self.key.{w}",
        "Qformer.bert.encoder.layer.{i}.attention.self.value.{w}",
    ),
    "qformer.blocks.{i}.self_attention.out.{w}": "Qformer.bert.encoder.layer.{i}.attention.output.dense.{w}",
    "qformer.blocks.{i}.self_attention_norm.{w}": "Qformer.bert.encoder.layer.{i}.attention.output.LayerNorm.{w}",
    "qformer.blocks.{i}.cross_attention.query.{w}": "Qformer.bert.encoder.layer.{i}.crossattention.self.query.{w}",
    "qformer.blocks.{i}.cross_attention.kv.{w}": (
        "Qformer.bert.encoder.layer.{i}.crossattention.self.key.{w}",
        "Qformer.bert.encoder.layer.{i}.crossattention.self.value.{w}",
    ),
    "qformer.blocks.{i}.cross_attention.out.{w}": "Qformer.bert.encoder.layer.{i}.crossattention.output.dense.{w}",
    "qformer.blocks.{i}.cross_attention_norm.{w}": (
        "Qformer.bert.encoder.layer.{i}.crossattention.output.LayerNorm.{w}"
    ),
    "qformer.blocks.{i}.query_ffn.up.{w}": "Qformer.bert.encoder.layer.{i}.intermediate_query.dense.{w}",
    "qformer.blocks.{i}.query_ffn.down.{w}": "Qformer.bert.encoder.layer.{i}.output_query.dense.{w}",
    "qformer.blocks.{i}.query_ffn_norm.{w}": "Qformer.bert.encoder.layer.{i}.output_query.LayerNorm.{w}",
    "qformer.blocks.{i}.text_ffn.up.{w}": "Qformer.bert.encoder.layer.{i}.intermediate.dense.{w}",
    "qformer.blocks.{i}.text_ffn.down.{w}": "Qformer.bert.encoder.layer.{i}.output.dense.{w}",
    "qformer.blocks.{i}.text_ffn_norm.{w}": "Qformer.bert.encoder.layer.{i}.output.LayerNorm.{w}",
}
_LAVIS_HEADS: Table = {
    "vision_projection.{w}": "vision_proj.{w}",
    "text_projection.{w}": "text_proj.{w}",
    "itm_head.{w}": "itm_head.{w}",
    "temperature": "temp",
    "itg_head.transform.{w}": "Qformer.cls.predictions.transform.dense.{w}",
    "itg_head.norm.{w}": "Qformer.cls.predictions.transform.LayerNorm.{w}",
    "itg_head.bias": "Qformer.cls.predictions.bias",
}
# What LAVIS calls the projection tells which language model it was trained with.
LAVIS_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")

# The vocabulary head of LAVIS is stored twice: its output weights are the word embeddings.
LAVIS_TWINS = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
# 0, 1, 2, …
LAVIS_POSITIONS = "Qformer.bert.embeddings.position_ids"

# LAVIS leaves out frozen parameters by name, and so keeps what is not a parameter, and the second names of shared ones.
LAVIS_FROZEN_REMAINS = frozenset(
    {
        "opt_model.lm_head.weight",
        "t5_model.encoder.embed_tokens.weight",
        "t5_model.decoder.embed_tokens.weight",
    }
)
LAVIS_ROTATIONS = "rotary_emb.inv_freq"


def lavis_table(vision_family: str, projection: str | None) -> Table:
    """LAVIS's names: with the heads of stage 1, or with a `projection` of stage 2 (one of `LAVIS_PROJECTIONS`)."""
    encoder = _LAVIS_EVA if vision_family == "eva" else _LAVIS_CLIP
    last: Table = _LAVIS_HEADS if projection is None else {"language_projection.{w}": f"{projection}.{{w}}"}
    return {**encoder, **_LAVIS_QFORMER, **last}
