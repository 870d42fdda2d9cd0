"""Writing a folder that transformers opens with `from_pretrained`, and servers that read its format."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    Blip2Processor,
    GenerationConfig,
    InstructBlipProcessor,
)

from qformers.convert.checkpoint import (
    Checkpoint,
    LanguageSource,
    check,
    language_skeleton,
    open_tokenizer,
    require_cls_readout,
)
from qformers.convert.huggingface import CLASSES, CONFIGS, EXTRA_FILE, EXTRA_KEY, GENERATION, INSTRUCT, RETRIEVAL
from qformers.convert.keys import LANGUAGE_MODEL
from qformers.convert.rename import to_theirs
from qformers.errors import ConfigError
from qformers.models.saving import reads_instructions
from qformers.models.tensors import Tensors, write_shards
from qformers.models.vision import quiet_loading

IMAGE_TOKEN = "<image>"

logger = logging.getLogger(__name__)


def write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write config, weights, processor, and the file of ours with what Hugging Face's class has no place for.

    Raises:
        ConfigError: an image encoder, or a readout of texts, that Hugging Face's BLIP-2 has no place for.
        CheckpointError: the checkpoint is damaged or does not fit its config.
    """
    check(checkpoint)
    description = checkpoint.description
    _refuse_other_encoders(checkpoint)
    require_cls_readout(checkpoint)
    architecture = _architecture(description)
    weights, extra = to_theirs(checkpoint.tensors, CLASSES[architecture])
    pictures = _image_processor(description["vision"])
    processor = _processor(checkpoint, architecture, pictures)
    config = _config(checkpoint, architecture, processor)
    language = checkpoint.language
    if language is not None:
        grown = _grown(language, config.text_config.to_dict())
        weights = weights.joined(grown.with_prefix(LANGUAGE_MODEL))
    config.dtype = _common_dtype(weights)
    config.save_pretrained(folder)
    (processor or pictures).save_pretrained(folder)
    if language is not None:
        ids = {"eos_token_id": config.text_config.eos_token_id, "pad_token_id": config.text_config.pad_token_id}
        GenerationConfig(**ids, bos_token_id=config.text_config.bos_token_id).save_pretrained(folder)
    notes = {"description": description} | ({} if language is None else {"language_model": language.config})
    kept = {name: extra.read(name).clone(memory_format=torch.contiguous_format) for name in extra.described}
    save_file(kept, folder / EXTRA_FILE, metadata={EXTRA_KEY: json.dumps(notes)})
    # vLLM reads every safetensors file of a folder that an index does not leave out.
    write_shards(weights, folder, "writing the weights", always_index=True)


def _refuse_other_encoders(checkpoint: Checkpoint) -> None:
    kind = checkpoint.description["vision"]["config"]["model_type"]
    if kind not in ("blip_2_vision_model", "instructblip_vision_model"):
        raise ConfigError(
            f"{checkpoint.source}: its image encoder is {kind}, and Hugging Face's BLIP-2 knows EVA's ViT alone: "
            "keep it in our format, or (CLIP's ViT) write LAVIS's"
        )
    native, image_px = (
        checkpoint.description["vision"]["config"]["image_size"],
        checkpoint.description["vision"]["image_px"],
    )
    if native != image_px:
        logger.warning(
            "%s takes pictures of %d px with position embeddings of %d px: transformers needs interpolate_pos_encoding",
            checkpoint.source,
            image_px,
            native,
        )


def _architecture(description: dict[str, Any]) -> str:
    if (original := description.get("huggingface")) is not None:
        return original["architectures"][0]
    if "language" not in description:
        return RETRIEVAL
    return INSTRUCT if reads_instructions(description) else GENERATION


def _config(checkpoint: Checkpoint, architecture: str, processor: Any) -> Any:
    """What config.json is to say: what the checkpoint came with, else our description; with the id of <image>."""
    description, language = checkpoint.description, checkpoint.language
    image_token = None if processor is None else processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config_class = CONFIGS["instructblip" if architecture == INSTRUCT else "blip-2"]
    if (original := description.get("huggingface")) is not None:
        config: Any = config_class.from_dict(original)
        if config.image_token_index is None and image_token is not None:
            # Of before transformers had <image>, without which it generates nothing today.
            config.image_token_index = image_token
            if language is not None:
                config.text_config.vocab_size = max(config.text_config.vocab_size, 1 + image_token)
        if architecture == RETRIEVAL:
            config.qformer_config.use_qformer_text_input = True  # once had another name
        return config
    settings: dict[str, Any] = {
        "vision_config": _without_type(description["vision"]["config"]),
        "qformer_config": _qformer_config(description, architecture),
        "num_query_tokens": description["model"]["num_queries"],
        "image_token_index": image_token,
        "architectures": [architecture],
    }
    if language is None:
        settings["image_text_hidden_size"] = description["model"]["embed_dim"]
    else:
        spoken = description["language"]
        ids = {"eos_token_id": spoken["end_id"], "pad_token_id": spoken["pad_id"]}
        words = max(AutoConfig.for_model(**language.config).vocab_size, 1 + (image_token or 0))
        settings["text_config"] = language.config | ids | {"vocab_size": words}
    return config_class(**settings)


def _without_type(config: dict[str, Any]) -> dict[str, Any]:
    """An image encoder's settings as BLIP-2's and InstructBLIP's share them."""
    return {name: value for name, value in config.items() if name not in ("model_type", "architectures")}


def _qformer_config(description: dict[str, Any], architecture: str) -> dict[str, Any]:
    shape, model = description["qformer"], description["model"]
    settings = {
        "hidden_size": shape["dim"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["ffn_dim"],
        "max_position_embeddings": shape["max_positions"],
        "cross_attention_frequency": model["cross_attention_frequency"],
        "hidden_dropout_prob": model["dropout"],
        "attention_probs_dropout_prob": model["attention_dropout"],
    }
    if architecture == RETRIEVAL:
        settings["use_qformer_text_input"] = True
    if architecture in (RETRIEVAL, INSTRUCT):
        settings["vocab_size"] = description["vocab_size"]
    return settings


def _image_processor(vision: dict[str, Any]) -> Any:
    with quiet_loading():
        from transformers import BlipImageProcessor  # warns where torchvision is not installed, which is not needed
    size = {"height": vision["image_px"], "width": vision["image_px"]}
    return BlipImageProcessor(size=size, image_mean=vision["mean"], image_std=vision["std"])


def _processor(checkpoint: Checkpoint, architecture: str, pictures: Any) -> Any:
    """The processor of the class, which adds <image> to its tokenizer; None (and a warning) without a tokenizer."""
    first = checkpoint.tokenizer if architecture == RETRIEVAL else checkpoint.language_tokenizer
    if first is None or (architecture == INSTRUCT and checkpoint.tokenizer is None):
        logger.warning("%s: has no tokenizer, so the folder has no processor: add one to use it", checkpoint.source)
        return None
    tokenizer, queries = open_tokenizer(first), checkpoint.description["model"]["num_queries"]
    if architecture == INSTRUCT:
        assert checkpoint.tokenizer is not None
        return InstructBlipProcessor(
            pictures, tokenizer, open_tokenizer(checkpoint.tokenizer), num_query_tokens=queries
        )
    return Blip2Processor(pictures, tokenizer, num_query_tokens=queries)


def _grown(language: LanguageSource, settings: dict[str, Any]) -> Tensors:
    """The language model's tensors with rows for the words that `settings` has beyond its own: <image>.

    A new row is the mean of the others, so that its logit is the mean of theirs and never the largest.
    """
    with torch.device("meta"):
        wanted = {name: weight.shape for name, weight in language_skeleton(settings).state_dict().items()}
    tensors = language.tensors

    def grow(name: str, tensor: Tensor) -> Tensor:
        axis = next(
            (a for a, (has, needs) in enumerate(zip(tensor.shape, wanted[name], strict=True)) if has < needs), None
        )
        if axis is None:
            return tensor
        # Part by part: a large vocabulary in float32 would be twice its memory again.
        sums = [part.float().sum(dim=axis, keepdim=True) for part in tensor.split(4096, dim=axis)]
        mean = (torch.cat(sums, dim=axis).sum(dim=axis, keepdim=True) / tensor.shape[axis]).to(tensor.dtype)
        return torch.cat([tensor, mean.repeat_interleave(wanted[name][axis] - tensor.shape[axis], dim=axis)], dim=axis)

    described = {name: grow(name, meta) for name, meta in tensors.described.items()}
    return Tensors(described, lambda name: grow(name, tensors.read(name)))


def _common_dtype(weights: Tensors) -> torch.dtype:
    """The least dtype that holds every weight exactly: transformers loads all of them in the one of config.json."""
    dtypes = [meta.dtype for meta in weights.described.values() if meta.is_floating_point()]
    common = dtypes[0]
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return common
