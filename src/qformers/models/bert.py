"""Start a Q-Former from a BERT (BLIP-2, section 3.1): shared and text weights copied, the rest random."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig

from qformers.errors import CheckpointError, ConfigError
from qformers.models.attention import SelfAttention
from qformers.models.qformer import QFormer, TextEmbeddings
from qformers.models.stage1 import Stage1Model
from qformers.models.vision import quiet_loading

# Ours → BERT's, within one block. A tuple is concatenated on the output axis: query, key and value are one.
BLOCK_KEYS = {
    "self_attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "self_attention.out": ("attention.output.dense",),
    "self_attention_norm": ("attention.output.LayerNorm",),
    "text_ffn.up": ("intermediate.dense",),
    "text_ffn.down": ("output.dense",),
    "text_ffn_norm": ("output.LayerNorm",),
    # The queries' feed-forward starts as a copy of the text's.
    "query_ffn.up": ("intermediate.dense",),
    "query_ffn.down": ("output.dense",),
    "query_ffn_norm": ("output.LayerNorm",),
}
HEAD_KEYS = {
    "itg_head.transform": "cls.predictions.transform.dense",
    "itg_head.norm": "cls.predictions.transform.LayerNorm",
}


def started_from_bert(name: str) -> bool:
    """Whether `load_bert_weights` fills the `Stage1Model` parameter called `name`: all of the Q-Former but its eyes."""
    fresh = "query_tokens" in name or "cross_attention" in name
    return name.startswith("qformer.") and not fresh


@torch.no_grad()
def load_bert_weights(model: Stage1Model, path: str) -> None:
    """Copy a Hugging Face BERT (folder or hub id) into the Q-Former and, where it has one, the ITG head.

    [DEC] has no row in BERT's vocabulary and keeps its random one. A Q-Former has no token types, so BERT's
    embedding of type 0, which BERT adds to every token, is added to the position embeddings. The authors drop
    it, and so start from a text model that is not quite BERT.

    Raises:
        CheckpointError: no BERT there, or one of another shape.
    """
    config, weights = _load_bert(path)
    _check_sizes(model, config, path)
    ours = dict(model.named_parameters())
    words = weights["bert.embeddings.word_embeddings.weight"]
    positions = weights["bert.embeddings.position_embeddings.weight"]
    positions = positions + weights["bert.embeddings.token_type_embeddings.weight"][0]
    embeddings = "qformer.text_embeddings"
    _copy(ours[f"{embeddings}.word.weight"][: words.shape[0]], words, f"{embeddings}.word.weight", path)
    _copy(ours[f"{embeddings}.position.weight"], positions, f"{embeddings}.position.weight", path)
    for kind in ("weight", "bias"):
        _copy(
            ours[f"qformer.embedding_norm.{kind}"],
            weights[f"bert.embeddings.LayerNorm.{kind}"],
            f"qformer.embedding_norm.{kind}",
            path,
        )
        for number in range(config.num_hidden_layers):
            for name, sources in BLOCK_KEYS.items():
                parts = [weights[f"bert.encoder.layer.{number}.{source}.{kind}"] for source in sources]
                key = f"qformer.blocks.{number}.{name}.{kind}"
                _copy(ours[key], torch.cat(parts), key, path)
        for name, source in HEAD_KEYS.items():
            if f"{source}.{kind}" in weights:
                _copy(ours[f"{name}.{kind}"], weights[f"{source}.{kind}"], f"{name}.{kind}", path)
    if "cls.predictions.bias" in weights:
        _copy(ours["itg_head.bias"][: words.shape[0]], weights["cls.predictions.bias"], "itg_head.bias", path)


@torch.no_grad()
def start_queries_as_words(qformer: QFormer, std: float) -> None:
    """Fill the query tokens with words of the vocabulary drawn at random, at positions 0 … queries - 1 of a sentence.

    A BERT's self-attention goes by positions: tokens of noise, which have none, it mixes into one within a few blocks.
    All are brought to the size `std`, which a LayerNorm takes away again, so that a step turns them as little as noise.
    """
    words, queries = qformer.text_embeddings, qformer.num_queries
    assert isinstance(words, TextEmbeddings), "a Q-Former that starts from a BERT has a text branch"
    if queries > (positions := words.position.num_embeddings):
        raise ConfigError(
            f"model.query_start is words: {queries} queries are more than the BERT's {positions} positions"
        )
    drawn = torch.randint(words.vocab_size - 1, (1, queries))  # all but [DEC]
    tokens = words(drawn)[0]
    qformer.query_tokens.copy_(tokens * (std / tokens.std()))


def _load_bert(path: str) -> tuple[BertConfig, dict[str, Tensor]]:
    """The checkpoint's own tensors: a vocabulary head that the files lack is left out."""
    try:
        with quiet_loading():
            bert, info = AutoModelForMaskedLM.from_pretrained(path, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: no BERT can be loaded from here ({reason})") from error
    if bert.config.model_type != "bert":
        raise CheckpointError(f"{path}: holds a {bert.config.model_type} model; a Q-Former starts from a BERT")
    if lacking := sorted(name for name in info["missing_keys"] if name.startswith("bert.")):
        raise CheckpointError(
            f"{path}: {len(lacking)} of the BERT's tensors are missing, first {lacking[0]}: fetch it again"
        )
    return bert.config, {name: value for name, value in bert.state_dict().items() if name not in info["missing_keys"]}


def _check_sizes(model: Stage1Model, config: BertConfig, path: str) -> None:
    """What shapes do not tell: heads leave no trace in them, and too few layers or words would fit."""
    blocks = model.qformer.blocks
    heads = next(part.heads for part in blocks.modules() if isinstance(part, SelfAttention))
    preset = "choose the preset that fits"
    for what, found, needed, fix in (
        ("layers", config.num_hidden_layers, len(blocks), preset),
        ("attention heads", config.num_attention_heads, heads, preset),
        ("words", config.vocab_size, model.dec_id, "its tokenizer and its weights disagree"),
    ):
        if found != needed:
            raise CheckpointError(f"{path}: this BERT has {found} {what}, the Q-Former {needed}: {fix}")


def _copy(target: Tensor, source: Tensor, name: str, path: str) -> None:
    if target.shape != source.shape:
        raise CheckpointError(
            f"{path}: {name} needs shape {tuple(target.shape)}, this BERT gives {tuple(source.shape)}: "
            "choose the preset that fits, or another text_encoder"
        )
    target.copy_(source)
