"""What a recipe takes: parameters, memory and time, by counting; nothing is built and no weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig

from qformers.errors import ConfigError
from qformers.models.presets import QFormerShape, preset_shape
from qformers.training.config import TrainConfig

CAPTION_TOKENS = 14  # of a batch's longest caption, as COCO's with [CLS] and [SEP]
BERT_VOCABULARY = 30523
FP32 = 4
STATE_BYTES = 4 * FP32  # of a trained parameter: weight, gradient and AdamW's two moments


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers; `ffn_products` is 3 where the feed-forward network is gated."""

    layers: int
    dim: int
    ffn_dim: int
    vocabulary: int = 0
    patch_px: int = 0
    ffn_products: int = 2

    @property
    def parameters(self) -> int:
        """Of the weight matrices; biases and norms are left out."""
        layer = 4 * self.dim**2 + self.ffn_products * self.dim * self.ffn_dim
        return self.layers * layer + self.vocabulary * self.dim + 3 * self.patch_px**2 * self.dim

    @property
    def kept_frozen(self) -> int:
        """Numbers of one position kept for a backward pass to the inputs alone: of each layer both norms' inputs,
        queries, keys, values and attention, and the activation's input (of a gated one, all three products')."""
        return self.layers * (6 * self.dim + (2 * self.ffn_products - 3) * self.ffn_dim)

    def flops(self, tokens: int) -> int:
        """Products and sums of a forward pass over one row of `tokens`."""
        layer = 4 * self.dim**2 + self.ffn_products * self.dim * self.ffn_dim
        cutting = 2 * tokens * 3 * self.patch_px**2 * self.dim
        return cutting + self.layers * (2 * tokens * layer + 4 * tokens**2 * self.dim)


# The recipes' models, so that the answer needs no network; any other is asked of its config.json.
KNOWN = {
    "openai/clip-vit-large-patch14": Layers(24, 1024, 4096, patch_px=14),
    "Salesforce/blip2-opt-2.7b": Layers(39, 1408, 6144, patch_px=14),
    "facebook/dinov2-small": Layers(12, 384, 1536, patch_px=14),
    "facebook/dinov2-base": Layers(12, 768, 3072, patch_px=14),
    "facebook/opt-2.7b": Layers(32, 2560, 10240, vocabulary=50272),
    "google/flan-t5-xl": Layers(48, 2048, 5120, vocabulary=32128, ffn_products=3),
}


@dataclass(frozen=True)
class Plan:
    """What one process of a recipe takes: bytes, and forward and backward products and sums of one step."""

    rows: int  # of the batch, on this process
    trained_parameters: int
    frozen_parameters: int
    state_bytes: int
    frozen_bytes: int
    activation_bytes: int
    step_flops: int
    feature_bytes_per_view: int

    @property
    def memory_bytes(self) -> int:
        """All together, without the allocator's own and what kernels use for a moment."""
        return self.state_bytes + self.frozen_bytes + self.activation_bytes


def plan(config: TrainConfig, gpus: int) -> Plan:
    """Count what `config` takes on `gpus` processes.

    Raises:
        ConfigError: the batch is not a multiple of `gpus`, or a model's shape is not known.
    """
    if gpus < 1 or config.data.batch_size % gpus:
        raise ConfigError(f"data.batch_size is {config.data.batch_size} for {gpus} GPU(s): it must be a multiple")
    if config.model.bridge != "qformer":
        raise ConfigError(f"model.bridge is {config.model.bridge}: only what a Q-Former takes can be counted")
    rows, shape = config.data.batch_size // gpus, preset_shape(config.model.preset)
    vision = layers_of(config.model.vision_encoder)
    patches = (config.data.transform.image_px // vision.patch_px) ** 2 + 1
    queries, frequency = config.model.num_queries, config.model.cross_attention_frequency
    half = FP32 if config.precision == "fp32" else 2  # auto: a GPU has bf16
    trained = qformer_parameters(shape, vision.dim, queries, frequency, config.model.embed_dim)
    frozen = vision.parameters
    vision_flops = 0 if config.data.features else vision.flops(patches)
    if config.stage == 1:
        forward = stage1_flops(shape, vision.dim, patches, queries, CAPTION_TOKENS, frequency)
        kept = stage1_kept(shape, vision.dim, patches, queries, CAPTION_TOKENS, frequency)
        step = rows * (vision_flops + 3 * forward)
    else:
        language = layers_of(config.language.path or "")
        frozen += language.parameters
        trained += shape.dim * language.dim
        tokens = queries + CAPTION_TOKENS
        forward = query_pass_flops(shape, vision.dim, patches, queries, frequency)
        # Backwards a frozen model's weights have no gradient: two passes of it, not three.
        spoken = language.flops(tokens) + 2 * CAPTION_TOKENS * language.dim * language.vocabulary
        step = rows * (vision_flops + 3 * forward + 2 * spoken)
        kept = query_pass_kept(shape, queries, frequency) + tokens * language.kept_frozen
        kept += 2 * CAPTION_TOKENS * language.vocabulary
    return Plan(
        rows=rows,
        trained_parameters=trained,
        frozen_parameters=frozen,
        state_bytes=trained * STATE_BYTES,
        frozen_bytes=frozen * half,
        activation_bytes=rows * (kept * half + patches * vision.dim * half),
        step_flops=step * config.accumulation_steps,
        feature_bytes_per_view=patches * vision.dim * (2 if config.data.feature_dtype == "bfloat16" else 1),
    )


def layers_of(path: str) -> Layers:
    """The shape of an image encoder or language model, known or by its config.json. Raises ConfigError."""
    if path in KNOWN:
        return KNOWN[path]
    try:
        found = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: its shape is not known here and its config cannot be read: {reason}") from error
    found = getattr(found, "vision_config", found)
    ffn = getattr(found, "intermediate_size", None) or int(getattr(found, "mlp_ratio", 4) * found.hidden_size)
    return Layers(
        found.num_hidden_layers,
        found.hidden_size,
        ffn,
        vocabulary=getattr(found, "vocab_size", 0),
        patch_px=getattr(found, "patch_size", 0),
    )


def qformer_parameters(shape: QFormerShape, vision_dim: int, queries: int, frequency: int, embed_dim: int) -> int:
    """Weight matrices of a stage-1 Q-Former: two feed-forward networks a layer, cross-attention in every
    `frequency`-th, embeddings (ITG's head reads them again), query tokens and heads."""
    dim, ffn = shape.dim, shape.ffn_dim
    layers = shape.layers * (4 * dim**2 + 4 * dim * ffn)
    crossing = -(-shape.layers // frequency) * (2 * dim**2 + 2 * vision_dim * dim)
    heads = (BERT_VOCABULARY + shape.max_positions) * dim + dim**2 + 2 * dim * embed_dim + queries * dim
    return layers + crossing + heads


def query_pass_flops(shape: QFormerShape, vision_dim: int, patches: int, queries: int, frequency: int) -> int:
    """Forward over one image: the queries with their cross-attention, keys and values of the patches included."""
    dim, crossing = shape.dim, -(-shape.layers // frequency)
    own = Layers(shape.layers, dim, shape.ffn_dim).flops(queries)
    return own + crossing * (4 * queries * dim**2 + 4 * patches * vision_dim * dim + 4 * queries * patches * dim)


def stage1_flops(shape: QFormerShape, vision_dim: int, patches: int, queries: int, tokens: int, frequency: int) -> int:
    """Forward over one pair: the packed pass of ITC and ITG, then ITM's three pairs; and ITG's head."""
    dim, crossing = shape.dim, -(-shape.layers // frequency)
    stack = Layers(shape.layers, dim, shape.ffn_dim)
    reading = crossing * (4 * queries * dim**2 + 4 * queries * patches * dim)
    packed = stack.flops(queries + 2 * tokens) + reading + crossing * 4 * patches * vision_dim * dim
    match = 3 * (stack.flops(queries + tokens) + reading)
    head = (tokens - 1) * 2 * (dim**2 + dim * BERT_VOCABULARY)
    return packed + match + head


def query_pass_kept(shape: QFormerShape, queries: int, frequency: int) -> int:
    """Numbers that a pass of the queries keeps for the backward pass."""
    return _kept(shape, queries, queries, frequency)


def stage1_kept(shape: QFormerShape, vision_dim: int, patches: int, queries: int, tokens: int, frequency: int) -> int:
    """Numbers that stage 1 keeps for the backward pass of one pair: both passes, the image's keys and values (and the
    negative image's copies of them), the patches under their norm, and ITG's logits with their softmax."""
    crossing = -(-shape.layers // frequency)
    packed = _kept(shape, queries + 2 * tokens, queries, frequency)
    match = 3 * _kept(shape, queries + tokens, queries, frequency)
    keys = 2 * crossing * 2 * patches * shape.dim
    return packed + match + keys + 2 * patches * vision_dim + 2 * (tokens - 1) * BERT_VOCABULARY


def _kept(shape: QFormerShape, length: int, queries: int, frequency: int) -> int:
    crossing = -(-shape.layers // frequency)
    # Of each position: input, queries, keys, values, attention, two norms and a sum; before and after the activation.
    return shape.layers * length * (8 * shape.dim + 2 * shape.ffn_dim) + crossing * queries * 5 * shape.dim
