"""Reading BLIP-2 as Hugging Face stores it: four classes, one folder each.

Blip2VisionModel is one of our image encoders already, and its `post_layernorm` is our `vision_norm`, with its own eps.
The checkpoints hold 39 of EVA's 40 layers and the last of those is read, so no layer is removed here.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Blip2Config, Blip2VisionConfig, InstructBlipConfig, PretrainedConfig
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qformers.convert.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    LanguageSource,
    folder_with,
    language_skeleton,
    language_tensors,
    open_tokenizer,
    own_weights,
    skeleton,
)
from qformers.convert.keys import HF_GENERATION, HF_INSTRUCT, HF_RETRIEVAL, HF_WITHOUT_MEANING, LANGUAGE_MODEL, Table
from qformers.convert.rename import to_ours
from qformers.errors import CheckpointError
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.presets import INITIAL_TEMPERATURE, QFormerShape, initialise, preset_of
from qformers.models.qformer import BERT_NORM_EPS
from qformers.models.saving import CONFIG_FILE, FORMATS, INSTRUCTBLIP_TEMPLATE
from qformers.models.stage1 import TokenHead
from qformers.models.tensors import Tensors, in_memory, open_safetensors, open_tensors
from qformers.models.vision import one_line, read_image_processor
from qformers.version import __version__

# What Hugging Face's classes have no place for: tensors under our names, and our config in the file's metadata.
EXTRA_FILE = "qformers.safetensors"
EXTRA_KEY = "qformers"
# Of InstructBLIP's language settings.
READS_PROMPT = {"qformer_reads": "prompt", "question_template": INSTRUCTBLIP_TEMPLATE}
QFORMER_TOKENIZER = "qformer_tokenizer"
RETRIEVAL = "Blip2ForImageTextRetrieval"
INSTRUCT = "InstructBlipForConditionalGeneration"
GENERATION = "Blip2ForConditionalGeneration"
CLASSES: dict[str, Table] = {
    GENERATION: HF_GENERATION,
    "Blip2Model": HF_GENERATION,
    RETRIEVAL: HF_RETRIEVAL,
    INSTRUCT: HF_INSTRUCT,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {"blip-2": Blip2Config, "instructblip": InstructBlipConfig}

logger = logging.getLogger(__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises CheckpointError if it is missing or no JSON."""
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder}: no model here, config.json is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no settings by name: fetch it again")
    return found


def read_huggingface(folder: Path, name: str) -> Checkpoint:
    """A folder that transformers wrote, or `write_huggingface`.

    Args:
        name: what the user calls it, for messages and as the origin of its parts.

    Raises:
        CheckpointError: not one of the four classes, or damaged, or its config and weights do not fit.
    """
    raw = read_config(folder)
    config, architecture = _config_of(raw, name)
    stored = open_tensors(folder)
    stored = stored.chosen(key for key in stored.described if key not in HF_WITHOUT_MEANING)
    speaks = architecture != RETRIEVAL
    qformer_tokenizer = folder / QFORMER_TOKENIZER if architecture == INSTRUCT else folder
    language_tokenizer = folder_with(folder, *TOKENIZER_FILES) if speaks else None
    extra, notes = in_memory({}), {}
    if (folder / EXTRA_FILE).is_file():
        extra, metadata = open_safetensors(folder / EXTRA_FILE)
        if EXTRA_KEY not in metadata:
            raise CheckpointError(
                f"{folder / EXTRA_FILE}: its metadata, our settings, is gone: remove the file, or copy it again"
            )
        notes = json.loads(metadata[EXTRA_KEY])
        description = notes["description"]
    else:
        description = _describe(config, architecture, folder, name, stored, language_tokenizer)
    language = None
    if speaks:
        language = _language(config, notes.get("language_model"), stored.without_prefix(LANGUAGE_MODEL), folder)
    needed = own_weights(skeleton(description, language and language.config, name))
    if architecture == RETRIEVAL and not extra.described:
        extra = _fresh(description, name)
    qformer = stored.chosen(key for key in stored.described if not (speaks and key.startswith(LANGUAGE_MODEL)))
    held = {key: tensor for key, tensor in needed.items() if key not in extra.described}
    return Checkpoint(
        source=name,
        description=description,
        tensors=to_ours(qformer, CLASSES[architecture], held, name).joined(extra),
        language=language,
        tokenizer=folder_with(qformer_tokenizer, *TOKENIZER_FILES) if description["qformer"]["has_text"] else None,
        language_tokenizer=language_tokenizer,
    )


def _config_of(raw: dict[str, Any], name: str) -> tuple[Any, str]:
    """The config, filled up with its class's defaults, and the class whose weights the folder holds."""
    if raw.get("model_type") not in CONFIGS:
        found = raw.get("model_type") or "something else"
        raise CheckpointError(f"{name}: holds {found}, no BLIP-2: give one of {', '.join(CLASSES)}, or a model of ours")
    architecture = next(iter(raw.get("architectures") or ["no class in its config.json"]))
    if architecture not in CLASSES:
        raise CheckpointError(f"{name}: holds {architecture}; those that can be read are {', '.join(CLASSES)}")
    try:
        return CONFIGS[raw["model_type"]].from_dict(raw), architecture
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{name}: its config.json cannot be used ({one_line(error)})") from error


def _describe(
    config: Any, architecture: str, folder: Path, name: str, stored: Tensors, language_tokenizer: Path | None
) -> dict[str, Any]:
    """What config.json of our format would say of a folder that was not written by us."""
    qformer = config.qformer_config
    if qformer.hidden_act != "gelu" or qformer.layer_norm_eps != BERT_NORM_EPS:
        raise CheckpointError(
            f"{name}: its Q-Former has hidden_act {qformer.hidden_act} and layer_norm_eps {qformer.layer_norm_eps}, "
            f"a Q-Former has gelu and {BERT_NORM_EPS}"
        )
    shape = QFormerShape(
        layers=qformer.num_hidden_layers,
        dim=qformer.hidden_size,
        heads=qformer.num_attention_heads,
        ffn_dim=qformer.intermediate_size,
        max_positions=qformer.max_position_embeddings,
        has_text=architecture in (RETRIEVAL, INSTRUCT),
    )
    model = ModelConfig(
        vision_encoder=name,
        preset=preset_of(shape),
        text_encoder=name,
        start_from_text_encoder=False,
        num_queries=config.num_query_tokens,
        cross_attention_frequency=qformer.cross_attention_frequency,
        embed_dim=getattr(config, "image_text_hidden_size", ModelConfig.embed_dim),
        dropout=float(qformer.hidden_dropout_prob),
        attention_dropout=float(qformer.attention_probs_dropout_prob),
    )
    language = None if architecture == RETRIEVAL else _describe_language(config, architecture, name, language_tokenizer)
    return description_of(
        model,
        shape,
        qformer.vocab_size if shape.has_text else 0,
        vision=_describe_vision(config.vision_config, folder, stored),
        vision_norm_eps=config.vision_config.layer_norm_eps,
        language=language,
    ) | {"huggingface": config.to_dict() | {"architectures": [architecture]}}


def description_of(
    model: ModelConfig,
    shape: QFormerShape,
    vocab_size: int,
    vision: dict[str, Any],
    vision_norm_eps: float,
    language: dict[str, Any] | None,
) -> dict[str, Any]:
    """`saving.describe_model` of a model that is not built."""
    return {
        "format": FORMATS[1 if language is None else 2],
        "qformers_version": __version__,
        "model": asdict(model),
        "qformer": shape.sizes(),
        "vocab_size": vocab_size,
        "vision": vision,
        "vision_norm_eps": vision_norm_eps,
    } | ({} if language is None else {"language": language})


def _describe_vision(config: PretrainedConfig, folder: Path, stored: Tensors) -> dict[str, Any]:
    # InstructBLIP's encoder is BLIP-2's under another name.
    settings = Blip2VisionConfig.from_dict(config.to_dict() | {"model_type": Blip2VisionConfig.model_type})
    processor = read_image_processor(str(folder))
    dtype = next(
        (meta.dtype for key, meta in stored.described.items() if key.startswith("vision_model.")), torch.float32
    )
    return {
        "config": settings.to_dict(),
        "layer": settings.num_hidden_layers,
        "image_px": settings.image_size,
        "mean": list(processor.get("image_mean", OPENAI_CLIP_MEAN)),
        "std": list(processor.get("image_std", OPENAI_CLIP_STD)),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _describe_language(config: Any, architecture: str, name: str, tokenizer: Path | None) -> dict[str, Any]:
    end_id = first_id(config.text_config.eos_token_id)
    if end_id is None:
        raise CheckpointError(f"{name}: its language model has no eos_token_id in text_config: a caption would not end")
    language = LanguageConfig(path=name, end_token=end_token(tokenizer, end_id))
    ids = {"end_id": end_id, "pad_id": padding_id(config.text_config, end_id)}
    return asdict(language) | ids | (READS_PROMPT if architecture == INSTRUCT else {})


def first_id(ids: int | list[int] | None) -> int | None:
    """A token's id where a config may have several."""
    return ids[0] if isinstance(ids, list) else ids


def padding_id(config: Any, end_id: int) -> int:
    """What fills up a language model's shorter texts; −1, as older Vicunas have it, is no token."""
    pad_id = first_id(config.pad_token_id)
    return end_id if pad_id is None or pad_id < 0 else pad_id


def end_token(tokenizer: Path | None, end_id: int) -> str | None:
    """The text of an end token that is not the tokenizer's own: OPT's captions end with a line break."""
    if tokenizer is None:
        return None
    opened = open_tokenizer(tokenizer)
    if opened.eos_token_id == end_id:
        return None
    text = str(opened.decode([end_id]))
    return text if opened(text, add_special_tokens=False)["input_ids"] == [end_id] else None


def _language(config: Any, original: dict[str, Any] | None, tensors: Tensors, folder: Path) -> LanguageSource:
    """The language model of a folder; with `original`, its config from before `write_huggingface` added words to it."""
    settings = original or config.text_config.to_dict()
    with torch.device("meta"):
        model = language_skeleton(settings)
    tensors = language_tensors(tensors, model)
    if original is not None:
        tensors = _cut(tensors, model)
    return LanguageSource(settings, tensors, folder, part_of_blip2=config.text_config)


def _cut(tensors: Tensors, model: nn.Module) -> Tensors:
    """`tensors` without the rows of words that the model of that config does not have."""
    rows = {name: weight.shape[0] for name, weight in model.state_dict().items() if weight.dim() > 0}

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: rows[name]] if tensor.dim() > 0 and name in rows else tensor

    described = {name: cut(name, meta) for name, meta in tensors.described.items()}
    return Tensors(described, lambda name: cut(name, tensors.read(name)))


def _fresh(description: dict[str, Any], name: str) -> Tensors:
    """The temperature and the ITG head that Hugging Face's retrieval model never had, always the same."""
    logger.warning("%s: holds no temperature and no ITG head; both start afresh, and only training reads them", name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = TokenHead(description["qformer"]["dim"], description["vocab_size"])
        head.apply(partial(initialise, std=QFormerShape.initial_std))
    fresh = {f"itg_head.{key}": tensor for key, tensor in head.state_dict().items()}
    return in_memory(fresh | {"temperature": torch.tensor(INITIAL_TEMPERATURE)})
