"""Where the sizes live: from a `ModelConfig` to a built `Stage1Model` or `Stage2Model`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qformers.errors import ConfigError
from qformers.models.attention import CrossAttention, SelfAttention
from qformers.models.bert import load_bert_weights, start_queries_as_words
from qformers.models.bridges import AveragePooling, Bridge, PerceiverLayer, PerceiverResampler, PooledMLP
from qformers.models.config import ModelConfig, PresetName
from qformers.models.freezing import freeze
from qformers.models.language import LanguageModel
from qformers.models.qformer import Block, FeedForward, NoText, QFormer, TextEmbeddings
from qformers.models.stage1 import Stage1Model, TokenHead
from qformers.models.stage2 import BridgedModel, Stage2Model
from qformers.models.vision import VisionEncoder

INITIAL_TEMPERATURE = 0.07
VISION_NORM_EPS = 1e-5  # LAVIS's ln_vision; Hugging Face's post_layernorm has 1e-6
LATENT_STD = 0.02  # of a perceiver's


@dataclass(frozen=True)
class QFormerShape:
    """Sizes of one Q-Former.

    `initial_std` is of fresh linear and embedding weights: BERT's 0.02 suits 768 wide; at half the width less of the
    image would reach the queries through the fresh cross-attention. `query_std` is of fresh query tokens, the authors'
    0.02. A LayerNorm follows them, so it changes no output, but how far a step turns them: at ten times the authors'
    rate 20 steps carry tokens of 0.02 all the same way. Without `has_text` there is no text branch.
    """

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    max_positions: int = 512
    initial_std: float = 0.02
    query_std: float = 0.02
    has_text: bool = True

    def sizes(self) -> dict[str, Any]:
        """What a saved model's description holds: all but what fresh weights are drawn from."""
        return {name: value for name, value in asdict(self).items() if name not in ("initial_std", "query_std")}


PRESETS: dict[PresetName, QFormerShape] = {
    "blip2": QFormerShape(layers=12, dim=768, heads=12, ffn_dim=3072),
    "small": QFormerShape(layers=6, dim=384, heads=12, ffn_dim=1536, initial_std=0.05, query_std=1.0),
    "tiny": QFormerShape(layers=2, dim=32, heads=4, ffn_dim=64),
}


def preset_shape(name: PresetName) -> QFormerShape:
    """The sizes of a preset. Raises ConfigError for `other`, which only a checkpoint can fill in."""
    if name not in PRESETS:
        raise ConfigError(f"model.preset is {name}, which has no sizes of its own: choose {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_of(shape: QFormerShape) -> PresetName:
    """The preset with these sizes, with or without a text branch; `other` if there is none."""
    for name, preset in PRESETS.items():
        if replace(shape, has_text=True).sizes() == preset.sizes():
            return name
    return "other"


def shape_of(qformer: QFormer) -> QFormerShape:
    """The sizes of a built Q-Former."""
    blocks = [block for block in qformer.blocks if isinstance(block, Block)]
    words = qformer.text_embeddings
    has_text = isinstance(words, TextEmbeddings)
    return QFormerShape(
        layers=len(blocks),
        dim=qformer.query_tokens.shape[1],
        heads=blocks[0].self_attention.heads,
        ffn_dim=blocks[0].query_ffn.up.out_features,
        max_positions=words.position.num_embeddings if has_text else QFormerShape.max_positions,
        has_text=has_text,
    )


def build_qformer(config: ModelConfig, shape: QFormerShape, vision_dim: int, vocab_size: int) -> QFormer:
    """A randomly initialised Q-Former: linear and embedding weights N(0, `initial_std`), biases 0."""
    if config.num_queries < 1:
        raise ConfigError(f"num_queries is {config.num_queries}: at least 1 query is needed to read the image")
    if config.cross_attention_frequency < 1:
        raise ConfigError(f"cross_attention_frequency is {config.cross_attention_frequency}: it must be 1 or more")
    blocks = [
        Block(
            self_attention=SelfAttention(shape.dim, shape.heads, config.attention_dropout),
            cross_attention=CrossAttention(shape.dim, vision_dim, shape.heads, config.attention_dropout)
            if number % config.cross_attention_frequency == 0
            else None,
            query_ffn=FeedForward(shape.dim, shape.ffn_dim),
            text_ffn=FeedForward(shape.dim, shape.ffn_dim) if shape.has_text else NoText(),
            dim=shape.dim,
            dropout=config.dropout,
        )
        for number in range(shape.layers)
    ]
    qformer = QFormer(
        query_tokens=nn.Parameter(torch.empty(config.num_queries, shape.dim)),
        text_embeddings=TextEmbeddings(vocab_size, shape.max_positions, shape.dim) if shape.has_text else NoText(),
        blocks=nn.ModuleList(blocks),
        dropout=config.dropout,
    )
    # Hugging Face leaves fresh query tokens at zero: then all queries stay identical for ever.
    nn.init.normal_(qformer.query_tokens, std=shape.query_std)
    qformer.apply(partial(initialise, std=shape.initial_std))
    return qformer


def build_stage1(
    config: ModelConfig, vocab_size: int, vision_encoder: VisionEncoder, shape: QFormerShape | None = None
) -> Stage1Model:
    """The stage-1 model of `config`, its image encoder frozen unless `config` says otherwise.

    Args:
        vocab_size: BERT's vocabulary plus one; the last id is [DEC].
        shape: of a Q-Former that is read from a checkpoint; None: the preset's.

    Raises:
        ConfigError: impossible sizes. CheckpointError: `text_encoder` has another shape than the preset.
    """
    shape = shape or preset_shape(config.preset)
    qformer = build_qformer(config, shape, vision_encoder.dim, vocab_size)
    model = Stage1Model(
        vision_encoder=vision_encoder,
        vision_norm=nn.LayerNorm(vision_encoder.dim, eps=VISION_NORM_EPS),
        qformer=qformer,
        vision_projection=nn.Linear(shape.dim, config.embed_dim),
        text_projection=nn.Linear(shape.dim, config.embed_dim),
        itm_head=nn.Linear(shape.dim, 2),
        itg_head=TokenHead(shape.dim, vocab_size),
        temperature=nn.Parameter(torch.tensor(INITIAL_TEMPERATURE)),
        dec_id=vocab_size - 1,
        text_readout=config.text_readout,
    )
    for part in (model.vision_projection, model.text_projection, model.itm_head, model.itg_head):
        part.apply(partial(initialise, std=shape.initial_std))
    if config.start_from_text_encoder:
        load_bert_weights(model, config.text_encoder)
        if config.query_start == "words":
            start_queries_as_words(qformer, shape.query_std)
    _prepare_encoder(vision_encoder, config)
    return model


def build_stage2(
    config: ModelConfig,
    vocab_size: int,
    vision_encoder: VisionEncoder,
    language_model: LanguageModel,
    shape: QFormerShape | None = None,
    reads_instructions: bool = False,
) -> Stage2Model:
    """The stage-2 model of `config`, all random but its two frozen models: `saving.start_from` fills the rest.

    The projection starts so that visual prompts are as large as word embeddings; the paper does not say.

    Args:
        shape: as for `build_stage1`. reads_instructions: as for `Stage2Model`.

    Raises:
        ConfigError: impossible sizes.
    """
    shape = shape or preset_shape(config.preset)
    model = Stage2Model(
        vision_encoder=vision_encoder,
        vision_norm=nn.LayerNorm(vision_encoder.dim, eps=VISION_NORM_EPS),
        qformer=build_qformer(config, shape, vision_encoder.dim, vocab_size),
        language_projection=nn.Linear(shape.dim, language_model.dim),
        language_model=language_model,
        reads_instructions=reads_instructions,
    )
    _start_projection(model)
    if shape.has_text and not reads_instructions:
        for part in model.text_branch():
            freeze(part, "text_branch")
    _prepare_encoder(vision_encoder, config)
    return model


def build_bridged(config: ModelConfig, vision_encoder: VisionEncoder, language_model: LanguageModel) -> BridgedModel:
    """The stage-2 model of a `config` whose bridge is no Q-Former, all random but its two frozen models.

    Raises:
        ConfigError: impossible sizes.
    """
    bridge = build_bridge(config, vision_encoder, language_model.dim)
    model = BridgedModel(
        vision_encoder=vision_encoder,
        vision_norm=nn.LayerNorm(vision_encoder.dim, eps=VISION_NORM_EPS),
        bridge=bridge,
        language_projection=nn.Linear(bridge.dim, language_model.dim),
        language_model=language_model,
    )
    _start_projection(model)
    _prepare_encoder(vision_encoder, config)
    return model


def build_bridge(config: ModelConfig, vision_encoder: VisionEncoder, llm_dim: int) -> Bridge:
    """The bridge that `config` names, random. A perceiver has the layers, width and heads of the preset."""
    dim, shape = vision_encoder.dim, preset_shape(config.preset)
    if config.num_queries < 1:
        raise ConfigError(f"num_queries is {config.num_queries}: at least 1 visual token is needed")
    if config.bridge == "perceiver":
        layers = [
            PerceiverLayer(shape.dim, shape.heads, shape.ffn_dim, config.attention_dropout, config.dropout)
            for _ in range(shape.layers)
        ]
        tokens = nn.Parameter(torch.empty(config.num_queries, shape.dim))
        bridge = PerceiverResampler(tokens, nn.Linear(dim, shape.dim), nn.ModuleList(layers))
        nn.init.normal_(tokens, std=LATENT_STD)
    else:
        bridge = AveragePooling(config.num_queries, dim, vision_encoder.prefix_tokens, vision_encoder.grid)
        if config.bridge == "mlp":
            bridge = PooledMLP(bridge, llm_dim)
    bridge.apply(partial(initialise, std=shape.initial_std))
    return bridge


def _start_projection(model: Stage2Model) -> None:
    """Visual prompts as large as word embeddings."""
    projection = model.language_projection
    # A query output comes from a LayerNorm: its entries are of size 1, so a product of `dim` of them grows by √dim.
    # On the meta device there is nothing to measure and nothing to fill.
    rms = 1.0 if projection.weight.is_meta else model.language_model.embedding_rms()
    initialise(projection, std=rms / math.sqrt(projection.in_features))


def _prepare_encoder(vision_encoder: VisionEncoder, config: ModelConfig) -> None:
    if not config.train_vision_encoder:
        freeze(vision_encoder, "vision_encoder")
    elif config.checkpoint_vision_encoder:
        vision_encoder.checkpoint_layers()


def initialise(module: nn.Module, std: float) -> None:
    """Fresh weights of one layer: linear and embedding weights N(0, `std`), biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
