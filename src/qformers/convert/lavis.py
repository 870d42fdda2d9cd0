"""Reading and writing the authors' checkpoints: one .pth of `torch.save`, {"model": tensors by name, …}.

LAVIS leaves frozen weights out and has no config of the sizes: the image encoder comes from the file where fine-tuning
changed it, else from `vision_encoder`; the language model always from `language_model`; the Q-Former is a BERT, whose
heads and tokenizer `text_encoder` knows. Its `ln_vision` has eps 1e-5 (Hugging Face's post_layernorm 1e-6).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Blip2VisionConfig, CLIPVisionConfig, PretrainedConfig
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qformers.convert.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    LanguageSource,
    check,
    folder_with,
    language_skeleton,
    language_tensors,
    local_folder,
    open_tokenizer,
    own_weights,
    require_cls_readout,
    skeleton,
)
from qformers.convert.huggingface import READS_PROMPT, description_of, first_id, padding_id, read_config
from qformers.convert.keys import (
    LAVIS_FROZEN_REMAINS,
    LAVIS_POSITIONS,
    LAVIS_PROJECTIONS,
    LAVIS_ROTATIONS,
    LAVIS_TWINS,
    lavis_table,
)
from qformers.convert.rename import to_ours, to_theirs
from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import FrozenParts, LanguageConfig, ModelConfig
from qformers.models.presets import VISION_NORM_EPS, QFormerShape, preset_of
from qformers.models.tensors import Tensors, in_memory, open_pickle, open_tensors, state_dict_of
from qformers.models.vision import build_vision_encoder, one_line, read_image_processor

logger = logging.getLogger(__name__)

# LAVIS has two image encoders; nothing in the weights tells their number of heads.
VISION_HEADS = {1024: 16, 1408: 16}
BERT_HEAD_DIM = 64
# OPT was trained to end a caption with a line break.
END_TOKENS = {"opt_proj": "\n"}
VISION = "vision_encoder."
# Our config, in a file that `write_lavis` wrote.
NOTES = "qformers"


def read_lavis(path: Path, parts: FrozenParts) -> Checkpoint:
    """A .pth of LAVIS: stage 1, stage 2 with any language model, fine-tuned, or InstructBLIP.

    Raises:
        ConfigError: it lacks a frozen model that `parts` does not name.
        CheckpointError: damaged, unsafe, or no Q-Former's.
    """
    loaded = open_pickle(path)
    state = state_dict_of(loaded.get("model", loaded) if isinstance(loaded, dict) else loaded, path)
    if "query_tokens" not in state or "ln_vision.weight" not in state:
        raise CheckpointError(f"{path}: lacks query_tokens or ln_vision: it is no BLIP-2 checkpoint of LAVIS")
    state = _without_twins(state, path)
    projection = next((name for name in LAVIS_PROJECTIONS if f"{name}.weight" in state), None)
    tokenizer, bert = _text_encoder(parts.text_encoder)
    family = _family(state, parts, path)
    language = None if projection is None else _language(parts, path, projection)
    description: dict[str, Any] | None = loaded.get(NOTES)
    encoder = None
    if description is None:
        vision, encoder = _vision(state, family, parts, path)
        description = _describe(state, bert, parts, path, vision, language, projection)
    if description["qformer"]["has_text"] and tokenizer is None:
        logger.warning("%s: %s has no tokenizer within reach, so no text can be read", path, parts.text_encoder)
    needed = own_weights(skeleton(description, language and language.config, str(path)))
    held = {name: tensor for name, tensor in needed.items() if encoder is None or not name.startswith(VISION)}
    tensors = to_ours(in_memory(state), lavis_table(family, projection), held, str(path))
    return Checkpoint(
        source=str(path),
        description=description,
        tensors=tensors if encoder is None else tensors.joined(encoder),
        language=language,
        tokenizer=tokenizer if description["qformer"]["has_text"] else None,
        language_tokenizer=None if language is None else folder_with(language.path, *TOKENIZER_FILES),
    )


def _describe(
    state: Mapping[str, Tensor],
    bert: PretrainedConfig | None,
    parts: FrozenParts,
    path: Path,
    vision: dict[str, Any],
    language: LanguageSource | None,
    projection: str | None,
) -> dict[str, Any]:
    """What config.json of our format would say of a file that LAVIS wrote."""
    shape, vocab_size, frequency = _qformer(state, bert, path)
    model = ModelConfig(
        vision_encoder=parts.vision_encoder or path.name,
        preset=preset_of(shape),
        text_encoder=parts.text_encoder,
        start_from_text_encoder=False,
        num_queries=state["query_tokens"].shape[1],
        cross_attention_frequency=frequency,
        embed_dim=state["vision_proj.weight"].shape[0] if projection is None else ModelConfig.embed_dim,
    )
    spoken = None
    if language is not None and projection is not None:
        # LAVIS keeps a stage-2 model's text branch only where it reads instructions.
        spoken = _describe_language(language, parts, projection) | (READS_PROMPT if shape.has_text else {})
    return description_of(model, shape, vocab_size, vision, VISION_NORM_EPS, spoken)


def write_lavis(checkpoint: Checkpoint, path: Path) -> None:
    """Write a .pth that LAVIS's `load_checkpoint` takes: as LAVIS does, without the language model.

    Raises:
        ConfigError: an image encoder or a readout of texts that LAVIS does not have.
        CheckpointError: it could not be written.
    """
    check(checkpoint)
    description = checkpoint.description
    kind = description["vision"]["config"]["model_type"]
    families = {"blip_2_vision_model": "eva", "instructblip_vision_model": "eva", "clip_vision_model": "clip"}
    if kind not in families:
        raise ConfigError(f"{checkpoint.source}: its image encoder is {kind}; LAVIS has EVA's ViT and CLIP's alone")
    require_cls_readout(checkpoint)
    projection = None
    if checkpoint.language is not None:
        family = checkpoint.language.config["model_type"]
        projection = {"opt": "opt_proj", "t5": "t5_proj"}.get(family, "llm_proj")
    theirs, homeless = to_theirs(checkpoint.tensors, lavis_table(families[kind], projection))
    assert not homeless.described, "LAVIS's names cover every weight"
    biases = [name for name in checkpoint.tensors.described if name.endswith("self_attn.qkv.bias")]
    if any(checkpoint.tensors.read(name).chunk(3)[1].any() for name in biases):
        logger.warning("%s: LAVIS has no bias of keys, which changes no output: it is left out", checkpoint.source)
    state = {name: theirs.read(name).clone() for name in theirs.described}
    state |= {twin: state[name] for twin, name in LAVIS_TWINS.items() if name in state and projection is None}
    state[LAVIS_POSITIONS] = torch.arange(description["qformer"]["max_positions"])[None]
    # LAVIS reads "model" alone; what its names do not tell is beside it.
    try:
        torch.save({"model": state, NOTES: description}, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise CheckpointError(f"{path}: could not be written ({one_line(error)}): free some space") from error


def _without_twins(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` with each weight once, and without what is left in it of a frozen language model."""
    without = {*LAVIS_TWINS, *LAVIS_FROZEN_REMAINS, LAVIS_POSITIONS}
    kept = {name: tensor for name, tensor in state.items() if name not in without and LAVIS_ROTATIONS not in name}
    for twin, name in LAVIS_TWINS.items():
        if twin not in state or (name in state and torch.equal(state[twin], state[name])):
            continue
        if name not in state or state[twin].shape == state[name].shape or state[twin].dim() > 1:
            raise CheckpointError(f"{path}: {twin} and {name} differ, and must be one weight: it is damaged")
        # Newer releases of transformers grow the head for [DEC] and leave behind BERT's bias, which nothing reads.
        kept[name] = state[twin]
    return kept


def _text_encoder(source: str) -> tuple[Path | None, PretrainedConfig | None]:
    """The folder of the BERT's tokenizer and the BERT's config, where they can be had."""
    try:
        folder = local_folder(source, weights=False)
    except ConfigError:
        return None, None
    try:
        bert = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        bert = None
    return folder_with(folder, *TOKENIZER_FILES), bert


def _qformer(state: Mapping[str, Tensor], bert: PretrainedConfig | None, path: Path) -> tuple[QFormerShape, int, int]:
    """Sizes of the Q-Former, its vocabulary (0: no text branch), and how often a block reads the image."""
    layer = "Qformer.bert.encoder.layer.{}.{}.weight"
    layers = 0
    while layer.format(layers, "attention.self.query") in state:
        layers += 1
    reading = [number for number in range(layers) if layer.format(number, "crossattention.self.query") in state]
    words = state.get("Qformer.bert.embeddings.word_embeddings.weight")
    dim = state["query_tokens"].shape[2]
    heads = dim // BERT_HEAD_DIM if bert is None else bert.num_attention_heads
    if bert is None and dim % BERT_HEAD_DIM:
        raise ConfigError(
            f"{path}: its Q-Former is {dim} wide, which no BERT is that is known here: name its text_encoder"
        )
    shape = QFormerShape(
        layers=layers,
        dim=dim,
        heads=heads,
        ffn_dim=state[layer.format(0, "intermediate_query.dense")].shape[0],
        max_positions=QFormerShape.max_positions
        if words is None
        else state["Qformer.bert.embeddings.position_embeddings.weight"].shape[0],
        has_text=words is not None,
    )
    frequency = reading[1] - reading[0] if len(reading) > 1 else layers
    return shape, 0 if words is None else words.shape[0], frequency


def _family(state: Mapping[str, Tensor], parts: FrozenParts, path: Path) -> str:
    """Whose layers the image encoder has: eva or clip."""
    if "visual_encoder.cls_token" in state:
        return "eva"
    if "visual_encoder.class_embedding" in state:
        return "clip"
    if parts.vision_encoder is None:
        width = state["ln_vision.weight"].shape[0]
        known = {1024: "openai/clip-vit-large-patch14", 1408: "Salesforce/blip2-opt-2.7b"}.get(width, "its folder")
        raise ConfigError(
            f"{path}: leaves out its frozen image encoder, {width} wide: name it as vision_encoder ({known})"
        )
    kind = read_config(local_folder(parts.vision_encoder, weights=False)).get("model_type")
    return "clip" if kind in ("clip", "clip_vision_model") else "eva"


def _vision(
    state: Mapping[str, Tensor], family: str, parts: FrozenParts, path: Path
) -> tuple[dict[str, Any], Tensors | None]:
    """The image encoder's description, and its tensors where the file leaves them out."""
    inside = any(name.startswith("visual_encoder.") for name in state)
    if not inside:
        assert parts.vision_encoder is not None, "_family asked for it"
        encoder = build_vision_encoder(parts.vision_encoder, dtype="auto")
        return encoder.describe(), in_memory(encoder.state_dict()).with_prefix(VISION)
    config = _vision_config(state, family, parts, path)
    named = parts.vision_encoder
    processor = {} if named is None else read_image_processor(str(local_folder(named, weights=False)))
    description = {
        "config": config.to_dict(),
        "layer": config.num_hidden_layers,
        "image_px": config.image_size,
        "mean": list(processor.get("image_mean", OPENAI_CLIP_MEAN)),
        "std": list(processor.get("image_std", OPENAI_CLIP_STD)),
        "dtype": str(state[_CLASS_TOKENS[family]].dtype).removeprefix("torch."),
    }
    return description, None


_CLASS_TOKENS = {"eva": "visual_encoder.cls_token", "clip": "visual_encoder.class_embedding"}


def _vision_config(state: Mapping[str, Tensor], family: str, parts: FrozenParts, path: Path) -> Any:
    """Sizes of the image encoder in the file: from its shapes, and the number of heads from where it is known."""
    eva = family == "eva"
    layer = "visual_encoder.blocks.{}.norm1.weight" if eva else "visual_encoder.transformer.resblocks.{}.ln_1.weight"
    layers = 0
    while layer.format(layers) in state:
        layers += 1
    kernel = state["visual_encoder.patch_embed.proj.weight" if eva else "visual_encoder.conv1.weight"]
    positions = (
        state["visual_encoder.pos_embed"].shape[1] if eva else state["visual_encoder.positional_embedding"].shape[0]
    )
    up = "visual_encoder.blocks.0.mlp.fc1.weight" if eva else "visual_encoder.transformer.resblocks.0.mlp.c_fc.weight"
    dim, patch_px = kernel.shape[0], kernel.shape[2]
    heads = VISION_HEADS.get(dim)
    if parts.vision_encoder is not None:
        named = read_config(local_folder(parts.vision_encoder, weights=False))
        heads = named.get("vision_config", named).get("num_attention_heads", heads)
    if heads is None:
        raise ConfigError(f"{path}: its image encoder is {dim} wide, which LAVIS's are not: name it as vision_encoder")
    config_class = Blip2VisionConfig if eva else CLIPVisionConfig
    return config_class(
        hidden_size=dim,
        intermediate_size=state[up].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        # 677 positions at 364 px: [CLS] and 26 × 26 patches
        image_size=patch_px * round((positions - 1) ** 0.5),
        patch_size=patch_px,
    )


def _language(parts: FrozenParts, path: Path, projection: str) -> LanguageSource:
    """The language model that the file was trained with."""
    if parts.language_model is None:
        raise ConfigError(
            f"{path}: has {projection} and leaves out its frozen language model: name it as language_model"
        )
    folder = local_folder(parts.language_model)
    settings = read_config(folder)
    try:
        with torch.device("meta"):
            model = language_skeleton(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{parts.language_model}: holds no language model ({one_line(error)})") from error
    return LanguageSource(settings, language_tensors(open_tensors(folder), model), folder)


def _describe_language(language: LanguageSource, parts: FrozenParts, projection: str) -> dict[str, Any]:
    config: Any = AutoConfig.for_model(**language.config)
    tokenizer = folder_with(language.path, *TOKENIZER_FILES)
    end_id, text = first_id(config.eos_token_id), END_TOKENS.get(projection)
    ids = (
        []
        if tokenizer is None or text is None
        else open_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"]
    )
    if len(ids) == 1:
        end_id = ids[0]
    if end_id is None:
        raise ConfigError(f"{parts.language_model}: has no eos_token_id: a caption would not end")
    settings = LanguageConfig(path=parts.language_model, end_token=text if len(ids) == 1 else None)
    return asdict(settings) | {"end_id": end_id, "pad_id": padding_id(config, end_id)}
