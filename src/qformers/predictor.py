"""The Python contract: `qformers.load` and what a loaded model can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from qformers.convert.run import open_model
from qformers.data.images import load_image
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import evaluation_transform, transform_for
from qformers.errors import CheckpointError, DataError
from qformers.evaluation.captioning import Captioner
from qformers.evaluation.pictures import PICTURES_AT_ONCE
from qformers.evaluation.scoring import itc_similarities, match_logits, text_features
from qformers.models.config import Dtype, FrozenParts, GenerationSettings, ModelConfig
from qformers.models.inspection import cross_attention_weights
from qformers.models.saving import LoadedModel, SavedLanguage, own_card, save_model
from qformers.models.stage2 import BridgedModel, Stage2Model
from qformers.models.tensors import fingerprint
from qformers.precision import without_emulation


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One picture as the encoder wants it; `key` names its content for whoever keeps patch embeddings."""

    pixel_values: Float[Tensor, "3 height width"]
    key: str


Picture = str | Path | bytes | Image.Image | np.ndarray | PreparedImage


@dataclass(frozen=True)
class EncodedImages:
    """Pictures after the frozen encoder, after the Q-Former, and projected for ITC (L2-normalised)."""

    patch_embeds: Float[Tensor, "images patches vision_dim"]
    query_outputs: Float[Tensor, "images queries dim"]
    features: Float[Tensor, "images queries embed_dim"]


@dataclass(frozen=True)
class EncodedTexts:
    """Texts projected for ITC (L2-normalised)."""

    features: Float[Tensor, "texts embed_dim"]


# In these a language model can be read; in any other it is converted after.
_DTYPES: dict[torch.dtype | None, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    vision_encoder: str | None = None,
    language_model: str | None = None,
    text_encoder: str = ModelConfig.text_encoder,
) -> Predictor:
    """The model of `path`: a run folder, what `save_pretrained` wrote, Hugging Face's BLIP-2 or InstructBLIP as a
    folder or hub id, or a .pth of the authors (docs/checkpoints.md).

    Args:
        dtype: of all weights; by default the Q-Former is in float32, the image encoder and the language model as they
            were saved, in float32 on a CPU that would only emulate a half.
        vision_encoder: folder or hub id of what a .pth leaves out: its frozen image encoder.
        language_model: the same of its frozen language model.
        text_encoder: the same of the BERT whose tokenizer the Q-Former has.

    Raises:
        CheckpointError: no such model, or damaged files. ConfigError: nothing there, or a .pth that needs more.
    """
    loaded = open_model(path, FrozenParts(vision_encoder, language_model, text_encoder), _DTYPES.get(dtype, "auto"))
    loaded.model.to(device, dtype)
    if dtype is None and torch.device(device).type == "cpu":
        without_emulation(loaded.model)
    return Predictor(loaded)


class Predictor:
    """A model of either stage with its preprocessing. Everything takes one item or many and batches inside.

    A stage-1 model compares and matches, a stage-2 model speaks; asked for what it lacks, it raises CheckpointError
    with what does have it.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model = loaded.model.eval()
        self.transform = transform_for(self.model.vision_encoder)
        self._tokenizer: CaptionTokenizer | None = None
        self._captioner: Captioner | None = None

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Of the Q-Former's texts. Raises CheckpointError where the model came without one."""
        if self._tokenizer is None:
            if self.loaded.tokenizer is None:
                raise CheckpointError(
                    f"{self.loaded.folder}: has no tokenizer of the Q-Former's, so it reads no text: put one into it, "
                    "or use a stage-1 model"
                )
            self._tokenizer = CaptionTokenizer.from_pretrained(self.loaded.tokenizer)
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.vision_norm.weight.device

    def fingerprint(self) -> str:
        """sha256 of the weights that `encode_image` and `encode_text` use, by which an index knows its model."""
        state = self.loaded.stage1().state_dict()
        unused = ("itm_head.", "itg_head.", "temperature")
        used = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
        return fingerprint(used, by_value=True)

    def preprocess(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "images 3 height width"]:
        """Pictures as the encoder wants them: shorter side resized, centre cropped, normalised.

        Raises:
            DataError: a picture that cannot be read, by name.
        """
        return torch.stack([self._prepared(image) for image in _many(images)])

    @torch.inference_mode()
    def patches(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "images patches vision_dim"]:
        """Pictures, few enough for one batch, through the frozen encoder alone. Raises as `preprocess`."""
        return self.model.vision_encoder(self.preprocess(images).to(self.device))

    @torch.inference_mode()
    def encode_image(self, pixel_values: Float[Tensor, "images 3 height width"]) -> EncodedImages:
        """What `preprocess` gave, through the frozen encoder and the Q-Former."""
        parts = []
        for pixels in pixel_values.split(PICTURES_AT_ONCE):
            encoded = self.encode_patches(self.model.vision_encoder(pixels.to(self.device)))
            parts.append((encoded.patch_embeds, encoded.query_outputs, encoded.features))
        return EncodedImages(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @torch.inference_mode()
    def encode_patches(self, patch_embeds: Float[Tensor, "images patches vision_dim"]) -> EncodedImages:
        """What `patches` gave, through the Q-Former, as one batch."""
        encoding = self.loaded.stage1().encode_image(patch_embeds)
        return EncodedImages(patch_embeds, encoding.query_outputs, encoding.image_features)

    def encode_text(self, texts: str | Sequence[str]) -> EncodedTexts:
        """ITC features of texts.

        Raises:
            DataError: an empty text.
        """
        return EncodedTexts(
            text_features(self.loaded.stage1(), self.tokenizer.encode, self._texts(texts)).to(self.device)
        )

    def itc(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Float[Tensor, "images texts"]:
        """Cosine similarity of every picture with every text, max over the queries."""
        encoded = self.encode_image(self.preprocess(images))
        return itc_similarities(encoded.features, self.encode_text(texts).features)

    def match(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Float[Tensor, " pairs"]:
        """Probability (0–1) that picture and text match, pair by pair; a single picture is judged against all texts.

        Raises:
            DataError: several pictures and another number of texts.
        """
        return self.match_logits(images, texts).softmax(dim=-1)[:, 1]

    def match_logits(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Float[Tensor, "pairs 2"]:
        """The ITM head's logits of no match and of match, pair by pair. Takes and raises what `match` does."""
        pictures, words = _many(images), self._texts(texts)
        if len(pictures) == 1:
            pictures = pictures * len(words)
        if len(pictures) != len(words):
            raise DataError(
                f"{len(pictures)} pictures and {len(words)} texts: match needs one text per picture, or one picture"
            )
        # A picture given several times, the same object, is read once.
        first = {id(picture): row for row, picture in reversed(list(enumerate(pictures)))}
        shown = np.array([first[id(picture)] for picture in pictures], dtype=np.int64)
        return match_logits(
            self.loaded.stage1(),
            lambda rows: self.patches([pictures[row] for row in rows]),
            self.tokenizer.encode(words),
            (shown, np.arange(len(words))),
        )

    def caption(
        self, images: Picture | Sequence[Picture], prompt: str | Sequence[str] | None = None, **generation: Any
    ) -> list[str]:
        """What the language model says of each picture, without the prompt.

        Args:
            prompt: one text for all pictures or one for each; default: the one it was trained with.
            generation: fields of `GenerationSettings`, such as `num_beams=5`. With `num_return_sequences` = n
                each picture has n captions, one after another.

        Raises:
            CheckpointError: a stage-1 model. ConfigError: settings that cannot be, or a prompt too long.
            DataError: a picture that cannot be read, or another number of prompts than of pictures.
        """
        speaker, settings = self._speaker(), GenerationSettings(**generation)
        pictures = _many(images)
        prompts = speaker.prompts(prompt, len(pictures))
        captions: list[str] = []
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            stop = start + PICTURES_AT_ONCE
            captions += speaker.say(self.patches(pictures[start:stop]), prompts[start:stop], settings)
        return captions

    def ask(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        template: str | None = None,
        **generation: Any,
    ) -> list[str]:
        """What the language model answers to a question about each picture.

        A single picture may be asked many questions, and one question be put to many pictures. Where the Q-Former was
        trained to read questions (the paper's VQA) or instructions (InstructBLIP), it reads them; an answer is the
        same whatever is asked beside it.

        Args:
            template: how the language model is asked, with {} for the question; default: as it was trained.
            generation: fields of `GenerationSettings`; default: the paper's 5 beams and length penalty -1. With
                `num_return_sequences` = n each question has n answers, one after another.

        Raises:
            CheckpointError: a stage-1 model. ConfigError: settings that cannot be, or a question too long.
            DataError: no picture, one that cannot be read, an empty question, or numbers that do not fit.
        """
        speaker, settings = self._speaker(), GenerationSettings.for_answers(**generation)
        pictures, words = self._asked(_many(images), self._texts(questions, "question", "ask something"))
        answers: list[str] = []
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            stop = start + PICTURES_AT_ONCE
            answers += speaker.answer(self.patches(pictures[start:stop]), words[start:stop], settings, template)
        return answers

    def stream_caption(self, image: Picture, prompt: str | None = None, **generation: Any) -> Iterator[str]:
        """The caption of one picture, piece by piece as it is generated. No beams.

        Raises as `caption`, and ConfigError for beams.
        """
        speaker, settings = self._speaker(), GenerationSettings(**generation)
        return speaker.stream(self.patches([image]), speaker.prompts(prompt, 1)[0], settings)

    def stream_answer(self, image: Picture, question: str, **generation: Any) -> Iterator[str]:
        """The answer to a question about one picture, piece by piece as it is generated. No beams.

        Raises as `ask`, and ConfigError for beams.
        """
        greedy = {"num_beams": 1, "length_penalty": 1.0}
        speaker, settings = self._speaker(), GenerationSettings.for_answers(**{**greedy, **generation})
        [words] = self._texts(question, "question", "ask something")
        return speaker.stream_answer(self.patches([image]), words, settings)

    def attention(self, image: Picture, text: str | None = None) -> Float[Tensor, "layers queries rows columns"]:
        """How much each query looks at each patch of the grid, per cross-attending block, mean over heads.

        With `text` the queries read it at the same time, as in ITM, or as a VQA model reads a question. What falls on
        tokens that are no patch ([CLS]) is left out, so a map sums to at most 1.

        Raises:
            CheckpointError: no Q-Former, or a text and a stage-2 model whose Q-Former was not trained to read any.
        """
        model, encoder = self.model, self.model.vision_encoder
        if isinstance(model, BridgedModel):
            bridge = self.loaded.config.bridge
            raise CheckpointError(f"{self.loaded.folder}: its bridge is {bridge}; only a Q-Former's queries look")
        tokens = None
        if text is not None:
            if isinstance(model, Stage2Model) and not model.reads_instructions:
                raise CheckpointError(
                    f"{self.loaded.folder}: its Q-Former reads no text: leave the text out, or give a stage-1 model or "
                    "one that was trained with language.qformer_reads"
                )
            input_ids, attention_mask = self.tokenizer.encode(self._texts(text))
            tokens = (input_ids.to(self.device), attention_mask.to(self.device))
        weights = cross_attention_weights(model, self.patches([image]), tokens)[..., encoder.prefix_tokens :]
        return rearrange(weights, "layers queries (rows columns) -> layers queries rows columns", rows=encoder.grid)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write safetensors, config, tokenizer and model card; `qformers.load` reads them back bit for bit."""
        language = None
        if self.loaded.language is not None:
            speaks = self.loaded.language_tokenizer is not None
            language = SavedLanguage(self.loaded.language, self._speaker().tokenizer if speaks else None)
        tokenizer = None if self.loaded.tokenizer is None else self.tokenizer
        card = own_card(self.loaded.folder)
        save_model(self.model, self.loaded.config, tokenizer, Path(folder), language, card=card)

    def _speaker(self) -> Captioner:
        if self._captioner is None:
            self._captioner = Captioner.of(self.loaded)
        return self._captioner

    def _prepared(self, image: Picture) -> Float[Tensor, "3 height width"]:
        if isinstance(image, PreparedImage):
            return image.pixel_values
        opened = load_image(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        return evaluation_transform(opened, self.transform)

    def _texts(self, texts: str | Sequence[str], what: str = "text", advice: str = "say what to look for") -> list[str]:
        words = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(words):
            if not text.strip():
                raise DataError(f"{what} {number + 1} of {len(words)} is empty: {advice}")
        return words

    def _asked(self, pictures: list[Picture], questions: list[str]) -> tuple[list[Picture], list[str]]:
        """A picture for each question: a single one of either goes with all of the other."""
        if not pictures or not questions:
            raise DataError(f"{len(pictures)} pictures and {len(questions)} questions: give at least one of each")
        asked = max(len(pictures), len(questions))
        pictures = pictures * asked if len(pictures) == 1 else pictures
        questions = questions * asked if len(questions) == 1 else questions
        if len(pictures) != len(questions):
            raise DataError(
                f"{len(pictures)} pictures and {len(questions)} questions: ask one question of each picture, or give "
                "one picture or one question"
            )
        return pictures, questions


def _many(images: Picture | Sequence[Picture]) -> list[Picture]:
    single = isinstance(images, str | Path | bytes | Image.Image | np.ndarray | PreparedImage)
    return [images] if single else list(images)
