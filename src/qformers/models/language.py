"""A frozen language model behind one interface: visual prompts and text in, logits or new text out.

Hugging Face's classes do the work. What differs between the two families is where the prompts go and who says the
target: a decoder-only model continues [visual prompts ; text], an encoder-decoder's encoder reads them and its
decoder says the target (BLIP-2, section 3.2 and figure 3).
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import GenerationSettings, LanguageConfig
from qformers.models.decoding import repeat_for_beams, roomy_cache
from qformers.models.freezing import freeze
from qformers.models.sampling import DrawnSampling
from qformers.models.vision import one_line, quiet_loading
from qformers.precision import without_emulation

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


class LanguageModel(nn.Module):
    """A frozen Hugging Face language model, in eval mode and in its own dtype; gradients flow through it.

    Attributes:
        dim: width of its word embeddings, and so of a visual prompt.
        end_id, pad_id: tokens that end a text, and that fill up finished rows of a batch.
    """

    model: Any  # a PreTrainedModel that generates; transformers has no type for both

    def __init__(self, model: PreTrainedModel, end_id: int, pad_id: int) -> None:
        super().__init__()
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise ConfigError(
                f"{type(model).__name__} takes no inputs_embeds, so it cannot be shown visual prompts: "
                "choose another language model"
            )
        self.model = model
        self.end_id = end_id
        self.pad_id = pad_id
        self.dim = int(self.model.get_input_embeddings().weight.shape[1])
        # A checkpoint's own habits (BART's forbidden repetitions, a chat model's sampling) would apply unasked.
        plain = GenerationConfig(decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None))
        self.model.generation_config = plain
        if (head := self.model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_contiguous)
        freeze(self, "language_model")

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings' entries, as the first layer gets them (of at most 4096 words)."""
        words = torch.arange(min(4096, self.model.get_input_embeddings().weight.shape[0]), device=self.model.device)
        return self.embed(words[None]).float().pow(2).mean().sqrt().item()

    def embed(self, input_ids: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens llm_dim"]:
        """Word embeddings as the model's first layer gets them, a family's scale (Gemma's, BART's) included."""
        return self.model.get_input_embeddings()(input_ids)

    def forward(
        self,
        visual_prompts: Float[Tensor, "rows queries llm_dim"],
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows tokens"],
        target_ids: Int[Tensor, "rows target_tokens"],
        target_mask: Bool[Tensor, "rows target_tokens"],
    ) -> Float[Tensor, "targets vocabulary"]:
        """Logits of the tokens that are True in `target_mask`, row by row, each given all before it.

        Args:
            input_ids: padded on the right. Of a decoder-only model the targets are among them, and `target_ids` is
                `input_ids`; an encoder-decoder reads them in its encoder and says `target_ids`.
        """
        embeds, mask = self._read(visual_prompts, input_ids, attention_mask)
        if self.is_encoder_decoder:
            # As T5 and BART are trained: the decoder starts from its start token and reads its own targets.
            start = torch.full_like(target_ids[:, :1], self._decoder_start_id)
            decoder_ids = torch.cat([start, target_ids[:, :-1]], dim=1)
            logits = self.model(
                inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
            ).logits
            return logits[target_mask]
        # The logits of a token are at the position before it. Positions that predict no target of any row are left
        # out of the vocabulary head, the largest product of a small model.
        queries = visual_prompts.shape[1]
        positions = target_mask.any(dim=0).nonzero()[:, 0]
        kept: dict[str, Tensor] = {}
        predicting = positions + queries - 1
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            kept = {"logits_to_keep": predicting}
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **kept).logits
        logits = logits if kept else logits[:, predicting]
        return logits[target_mask[:, positions]]

    @torch.inference_mode()
    def generate(
        self,
        visual_prompts: Float[Tensor, "rows queries llm_dim"],
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows tokens"],
        settings: GenerationSettings,
        streamer: BaseStreamer | None = None,
        draws: Float[Tensor, "rows answers_of_each max_new_tokens"] | None = None,
    ) -> Int[Tensor, "answers new_tokens"]:
        """New tokens after each row's prompts: `num_return_sequences` answers a row, in row order, prompt left out.

        Args:
            draws: of nucleus sampling, the random numbers of each answer's tokens (`sampling.draws_for`): an answer is
                then the same in any batch. Default: torch's own random state.

        Raises:
            ConfigError: prompts and `max_new_tokens` are longer than the model's context.
        """
        embeds, mask = self._read(visual_prompts, input_ids, attention_mask)
        if self.is_encoder_decoder:
            self.check_context(max(embeds.shape[1], 1 + settings.max_new_tokens))
        else:
            self.check_context(embeds.shape[1] + settings.max_new_tokens)
        if not self.is_encoder_decoder:
            embeds, mask = _padded_left(embeds, mask)
        sampling = settings.top_p is not None
        answers_of_each = settings.num_return_sequences
        inputs: dict[str, Any] = {"inputs_embeds": embeds}
        cache = self._cache(embeds, mask, max(settings.num_beams, answers_of_each), settings.max_new_tokens)
        options: dict[str, Any] = {}
        processors = LogitsProcessorList()
        if sampling and draws is None:
            options = {"top_p": settings.top_p, "temperature": settings.temperature, "top_k": 0}
        if settings.repetition_penalty != 1.0:
            # generate's own would take the padding of a row for so many of its new tokens and spare them.
            processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if draws is not None:
            assert settings.top_p is not None, "only sampling has draws"
            # Each answer a row of its own and no sampling by `generate`, whose draws are the whole batch's.
            inputs, mask = self._each_answer(embeds, mask, answers_of_each)
            processors.append(DrawnSampling(draws.flatten(0, 1), settings.top_p, settings.temperature))
            sampling, answers_of_each = False, 1
        if streamer is not None:
            options["streamer"] = streamer
        with quiet_loading():
            said = self.model.generate(
                **inputs,
                **cache,
                attention_mask=mask.long(),
                max_new_tokens=settings.max_new_tokens,
                min_new_tokens=settings.min_new_tokens,
                num_beams=settings.num_beams,
                num_return_sequences=answers_of_each,
                length_penalty=settings.length_penalty,
                do_sample=sampling,
                eos_token_id=self.end_id,
                pad_token_id=self.pad_id,
                logits_processor=processors,
                **options,
            )
        return said[:, 1:] if self.is_encoder_decoder else said  # a decoder's answer begins with its start token

    def _cache(
        self,
        embeds: Float[Tensor, "rows length llm_dim"],
        mask: Bool[Tensor, "rows length"],
        rows_of_each: int,
        new_tokens: int,
    ) -> dict[str, Any]:
        """The cache that `generate` starts from, one that grows in place; nothing where a family keeps another kind."""
        if self.is_encoder_decoder or not self.model._supports_default_dynamic_cache():
            return {}
        if rows_of_each == 1 or embeds.shape[1] < 2:
            cache = roomy_cache(self.model.config, room=new_tokens)
            return {} if cache is None else {"past_key_values": cache}
        read = self._read_once(embeds[:, :-1], mask[:, :-1])
        return {"past_key_values": repeat_for_beams(read, rows_of_each, room=1 + new_tokens)}

    def _read_once(self, embeds: Float[Tensor, "rows read llm_dim"], mask: Bool[Tensor, "rows read"]) -> DynamicCache:
        """Keys and values of all but the last place of each row, to be repeated for its beams or samples.

        `generate` repeats a row before it reads it: with 5 beams 5 times the work until the first token. The last place
        is left for it to read, because there the first token is predicted. An encoder reads a row once anyway.
        """
        with quiet_loading():
            return self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=self.pad_id,
            ).past_key_values

    def _each_answer(
        self, embeds: Float[Tensor, "rows length llm_dim"], mask: Bool[Tensor, "rows length"], answers: int
    ) -> tuple[dict[str, Any], Bool[Tensor, "answers length"]]:
        """`generate`'s input and its mask with every row repeated; an encoder reads it once."""
        repeated = mask.repeat_interleave(answers, dim=0)
        if not self.is_encoder_decoder:
            return {"inputs_embeds": embeds.repeat_interleave(answers, dim=0)}, repeated
        read = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state
        return {"encoder_outputs": BaseModelOutput(read.repeat_interleave(answers, dim=0))}, repeated

    def check_context(self, tokens: int) -> None:
        """Raise ConfigError when `tokens`, visual prompts included, are more than the model has positions for."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and tokens > context:
            raise ConfigError(
                f"visual prompts, prompt and answer take {tokens} tokens, the language model's context is {context}: "
                "shorten the prompt or lower max_new_tokens"
            )

    @property
    def _decoder_start_id(self) -> int:
        return int(self.model.config.decoder_start_token_id)

    def _read(
        self,
        visual_prompts: Float[Tensor, "rows queries llm_dim"],
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows tokens"],
    ) -> tuple[Float[Tensor, "rows length llm_dim"], Bool[Tensor, "rows length"]]:
        """[visual prompts ; word embeddings] and their mask."""
        embeds = torch.cat([visual_prompts.to(self.dtype), self.embed(input_ids).to(self.dtype)], dim=1)
        seen = attention_mask.new_ones(visual_prompts.shape[:2])
        return embeds, torch.cat([seen, attention_mask], dim=1)


def _contiguous(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward hook of the vocabulary head. Before the first new token it gets a slice, each row's last place.

    PyTorch multiplies such a slice row by row: on a CPU ten times slower in float32, hundreds of times in bfloat16.
    """
    hidden, *others = arguments
    return hidden.contiguous(), *others


def _padded_left(
    embeds: Float[Tensor, "rows length llm_dim"], mask: Bool[Tensor, "rows length"]
) -> tuple[Float[Tensor, "rows length llm_dim"], Bool[Tensor, "rows length"]]:
    """The same rows with their padding moved to the front: new tokens then follow every row's last token."""
    length = mask.shape[1]
    padding = length - mask.sum(dim=1, keepdim=True)
    source = (torch.arange(length, device=mask.device) - padding) % length
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return embeds[rows, source], mask[rows, source]


def build_language_model(
    config: LanguageConfig, end_id: int, pad_id: int, part_of_blip2: PretrainedConfig | None = None
) -> LanguageModel:
    """The language model of a folder or hub id, frozen; decoder-only or encoder-decoder, as its config says.

    Args:
        part_of_blip2: the language model's own config, where the folder holds a whole BLIP-2.

    Raises:
        ConfigError: nothing there, no language model that generates, or one that takes no visual prompts.
        CheckpointError: its weights cannot be read.
    """
    assert config.path is not None, "the caller fills in where the language model is"
    source = config.path
    described = part_of_blip2 or _described(source)
    if described.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        described.is_encoder_decoder or getattr(described, "is_decoder", False)
    ):
        raise ConfigError(f"{source}: {described.model_type} fills gaps and does not go on from a text: choose another")
    auto = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if part_of_blip2 is not None:
        options |= {"config": part_of_blip2, "key_mapping": {r"^language_model\.": ""}}
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config.quantization)
    try:
        with quiet_loading():
            loaded: Any = auto.from_pretrained(source, output_loading_info=True, **options)
            model, loading = loaded
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{source}: {described.model_type} cannot be used ({one_line(error)})") from error
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{source}: the weights cannot be read ({one_line(error)}): fetch them again") from error
    if part_of_blip2 is not None:
        # Otherwise save_pretrained would put the name of the whole back in front of every weight.
        model._weight_conversions = None
    if absent := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"{source}: {len(absent)} of the weights are missing, first {absent[0]}: not a whole {described.model_type}"
        )
    if config.dtype == "auto" and config.quantization == "none" and not torch.cuda.is_available():
        without_emulation(model)
    if model.dtype == torch.float16 and not torch.cuda.is_available():
        # A CPU's autocast mixes bf16 into it, which its norms refuse.
        logger.info("%s is stored in float16, which this machine cannot train through: bfloat16 is used", source)
        model = model.to(torch.bfloat16)
    if model.dtype == torch.bfloat16 and not torch.cuda.is_available():
        # As in `attention.attend`: a CPU's fused kernel is slow to train through in half precision.
        model.set_attn_implementation("eager")
    return LanguageModel(model, end_id, pad_id)


def is_encoder_decoder(folder_or_hub_id: str) -> bool:
    """Whether the language model there has an encoder of its own. Raises ConfigError where there is none."""
    return bool(_described(folder_or_hub_id).is_encoder_decoder)


def _described(source: str) -> PretrainedConfig:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ConfigError(f"{source}: there is no such folder: name that of a Hugging Face language model, or a hub id")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{source}: no language model can be loaded from here ({one_line(error)})") from error


def _quantization(kind: str) -> Any:
    """Settings of bitsandbytes, which quantises the weights while they load.

    Raises:
        ConfigError: it is not installed.
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"language.quantization {kind} needs bitsandbytes: `pip install bitsandbytes`, or use none")
    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")
