"""What writes captions: a stage-2 model of ours, or an image-to-text model of Hugging Face's."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, LogitsProcessorList

from qformers.capfilt.config import SamplingConfig
from qformers.capfilt.encoding import (
    EncodesPictures,
    OwnTransform,
    PictureTransform,
    ProcessorTransform,
    image_processor,
    is_ours,
    own_encoder_key,
    weights_dtype,
)
from qformers.data.transforms import transform_for
from qformers.errors import CheckpointError, ConfigError
from qformers.evaluation.captioning import Captioner
from qformers.models.config import GenerationSettings
from qformers.models.sampling import DrawnSampling
from qformers.models.tensors import fingerprint
from qformers.models.vision import one_line, quiet_loading
from qformers.predictor import load


@runtime_checkable
class CaptionWriter(EncodesPictures, Protocol):
    """Pictures → sampled captions. `fingerprint` is of all weights that have a part in them."""

    fingerprint: str

    def write(self, encoded: Tensor, draws: Float[Tensor, "pictures captions tokens"]) -> list[list[str]]:
        """Captions of pictures that `encode` gave; each is a function of its picture and its draws."""
        ...


def open_captioner(source: str, sampling: SamplingConfig, device: str) -> CaptionWriter:
    """The captioner of a run, a saved model, a folder or a hub id.

    Raises:
        ConfigError: nothing there, or a model that captions only with a text. CheckpointError: damaged, or of stage 1.
    """
    if is_ours(source):
        return OwnCaptioner(source, sampling, device)
    return HuggingFaceCaptioner(source, sampling, device)


def generation_settings(sampling: SamplingConfig) -> GenerationSettings:
    """As every captioner generates. Raises ConfigError for settings that cannot be."""
    return GenerationSettings(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        top_p=sampling.top_p,
        temperature=sampling.temperature,
        num_return_sequences=sampling.captions,
    )


class OwnCaptioner:
    """A stage-2 model; `encode` is its frozen image encoder."""

    def __init__(self, source: str, sampling: SamplingConfig, device: str) -> None:
        predictor = load(source, device, weights_dtype(device))
        self.captioner = Captioner.of(predictor.loaded)
        self.device = device
        self.settings = generation_settings(sampling)
        self.prompt = sampling.prompt
        self.encoder = predictor.model.vision_encoder
        self.transform: PictureTransform = OwnTransform(transform_for(self.encoder))
        self.encoder_key = own_encoder_key(self.encoder)
        self.fingerprint = fingerprint(self.captioner.model.state_dict())

    @torch.inference_mode()
    def encode(self, pixel_values: Float[Tensor, "pictures 3 height width"]) -> Tensor:
        return self.encoder(pixel_values.to(self.device))

    def write(self, encoded: Tensor, draws: Float[Tensor, "pictures captions tokens"]) -> list[list[str]]:
        prompts = self.captioner.prompts(self.prompt, len(encoded))
        said = self.captioner.say(encoded.to(self.device), prompts, self.settings, draws)
        each = self.settings.num_return_sequences
        return [said[start : start + each] for start in range(0, len(said), each)]


class HuggingFaceCaptioner:
    """A model of the class that transformers gives for image-to-text (BLIP, GIT, a ViT with GPT-2, …).

    Its image encoder is inside its own `generate`, so `encode` gives the pixels back.
    """

    def __init__(self, source: str, sampling: SamplingConfig, device: str) -> None:
        self.settings = generation_settings(sampling)
        self.device = device
        image_processor(source)  # one that cannot be read is said before the weights are
        try:
            with quiet_loading():
                self.model: Any = AutoModelForImageTextToText.from_pretrained(
                    source, dtype=weights_dtype(device) or "auto", trust_remote_code=False
                ).to(cast(Any, device))
                self.tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{source}: no captioner can be read from here ({one_line(error)})") from error
        self.prompt = (sampling.prompt or "").strip()
        self.prompt_ids = self._prompt_ids(source) if self.prompt else None
        self.transform: PictureTransform = ProcessorTransform(source)
        self.encoder_key = f"pixels {self.transform}"
        self.fingerprint = fingerprint(self.model.state_dict())
        self._try(source)

    def encode(self, pixel_values: Float[Tensor, "pictures 3 height width"]) -> Tensor:
        return pixel_values

    @torch.inference_mode()
    def write(self, encoded: Tensor, draws: Float[Tensor, "pictures captions tokens"]) -> list[list[str]]:
        settings = self.settings
        assert settings.top_p is not None, "captions are sampled"
        # The processor leaves one token to choose from, so `do_sample`, which allows many answers, draws nothing.
        drawn = DrawnSampling(draws.flatten(0, 1), settings.top_p, settings.temperature)
        inputs: dict[str, Tensor] = {}
        if self.prompt_ids is not None:
            inputs["input_ids"] = self.prompt_ids.repeat(len(encoded), 1).to(self.device)
        with quiet_loading():
            ids = self.model.generate(
                pixel_values=encoded.to(self.device, self.model.dtype),
                **inputs,
                max_new_tokens=settings.max_new_tokens,
                min_new_tokens=settings.min_new_tokens,
                num_beams=1,
                num_return_sequences=settings.num_return_sequences,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                logits_processor=LogitsProcessorList([drawn]),
            )
        said = [self._without_prompt(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        each = settings.num_return_sequences
        return [said[start : start + each] for start in range(0, len(said), each)]

    def _prompt_ids(self, source: str) -> Int[Tensor, "1 tokens"]:
        if self.model.config.is_encoder_decoder:
            raise ConfigError(f"{source}: its decoder starts by itself: leave out the prompt")
        ids = self.tokenizer(self.prompt)["input_ids"]
        ends = (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)
        # BLIP takes the end off by itself; any other model would take it for the end of the caption.
        if self.model.config.model_type != "blip" and ids[-1] in ends:
            ids = ids[:-1]
        return torch.tensor([ids])

    def _without_prompt(self, text: str) -> str:
        text = text.strip()
        return text[len(self.prompt) :].strip() if text.lower().startswith(self.prompt.lower()) else text

    def _try(self, source: str) -> None:
        """Caption an empty picture. Raises ConfigError where the model wants more than a picture."""
        draws = torch.zeros(1, self.settings.num_return_sequences, self.settings.max_new_tokens)
        try:
            self.write(self.transform(Image.new("RGB", (64, 64), "white"))[None], draws)
        except Exception as error:  # whatever its code runs into without a text
            kind = self.model.config.model_type
            raise ConfigError(f"{source}: {kind} does not caption a picture alone ({one_line(error)})") from error
