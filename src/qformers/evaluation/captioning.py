"""Captions from a stage-2 model: of a batch of pictures, of one token by token, of a whole data set with its scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Thread

import torch
from jaxtyping import Float
from torch import Tensor

from qformers.convert.run import open_model
from qformers.data.config import SourceConfig
from qformers.data.dataset import CaptionDataset
from qformers.data.language_text import LanguageTokenizer
from qformers.data.sources import open_source
from qformers.data.text import CaptionTokenizer
from qformers.data.transforms import transform_for
from qformers.errors import CheckpointError, ConfigError, DataError
from qformers.evaluation.caption_metrics import by_domain, caption_metrics
from qformers.evaluation.caption_sources import read_domains
from qformers.evaluation.pictures import patch_batches
from qformers.models.config import GenerationSettings, LanguageConfig
from qformers.models.saving import LoadedModel
from qformers.models.stage2 import Stage2Model

# Position embeddings of a BERT.
MAX_INSTRUCTION_TOKENS = 512


@dataclass(frozen=True)
class Captioner:
    """A stage-2 model with its language model's tokenizer: patch embeddings and prompts in, text out.

    `instructions` is the tokenizer of a Q-Former that reads text too, the question alone or the whole prompt, as
    `language` says; None: it reads none.
    """

    model: Stage2Model
    language: LanguageConfig
    tokenizer: LanguageTokenizer
    instructions: CaptionTokenizer | None

    @classmethod
    def of(cls, loaded: LoadedModel) -> Captioner:
        """The captioner of a saved model. Raises CheckpointError if it is of stage 1 or lacks a tokenizer."""
        model, language = loaded.stage2()
        if loaded.language_tokenizer is None or (model.reads_instructions and loaded.tokenizer is None):
            raise CheckpointError(
                f"{loaded.folder}: lacks a tokenizer: put the language model's files beside the weights"
            )
        instructions = None
        if model.reads_instructions and loaded.tokenizer is not None:
            instructions = CaptionTokenizer.from_pretrained(loaded.tokenizer, MAX_INSTRUCTION_TOKENS, "error")
        tokenizer = LanguageTokenizer.from_pretrained(
            loaded.language_tokenizer,
            is_encoder_decoder=model.language_model.is_encoder_decoder,
            prompt=language.prompt,
            end_token=language.end_token,
        )
        return cls(model, language, tokenizer, instructions)

    def visual_prompts(
        self, patch_embeds: Float[Tensor, "images patches vision_dim"], instructions: Sequence[str]
    ) -> Float[Tensor, "images queries llm_dim"]:
        """The model's, of pictures and, where the Q-Former reads them, of a text for each."""
        if self.instructions is None:
            return self.model.visual_prompts(patch_embeds)
        input_ids, attention_mask = self.instructions.encode(list(instructions))
        device = patch_embeds.device
        return self.model.visual_prompts(patch_embeds, (input_ids.to(device), attention_mask.to(device)))

    def answer(
        self,
        patch_embeds: Float[Tensor, "images patches vision_dim"],
        questions: Sequence[str],
        settings: GenerationSettings,
        template: str | None = None,
    ) -> list[str]:
        """Answers to a question for each picture, `num_return_sequences` a picture, in order of the pictures.

        Args:
            template: what the question becomes for the language model, in place of the model's own.

        Raises:
            ConfigError: a question is too long for the model's context, or a template without its one {}.
        """
        return self.say(patch_embeds, self._asked(questions, template), settings, instructions=self._shown(questions))

    def question_inputs(
        self,
        patch_embeds: Float[Tensor, "images patches vision_dim"],
        questions: Sequence[str],
        template: str | None = None,
    ) -> tuple[Float[Tensor, "images queries llm_dim"], list[str]]:
        """What the language model is given of questions before it answers: visual prompts, and the prompts."""
        prompts = self._asked(questions, template)
        return self.visual_prompts(patch_embeds, self._shown(questions) or prompts), prompts

    def prompts(self, prompt: str | Sequence[str] | None, pictures: int) -> list[str]:
        """One prompt for each of so many pictures: the given one, or each its own; None: the trained one.

        Raises:
            DataError: several prompts, and another number of pictures.
        """
        if prompt is None:
            prompt = self.tokenizer.prompt
        prompts = [prompt] * pictures if isinstance(prompt, str) else list(prompt)
        if len(prompts) != pictures:
            raise DataError(f"{pictures} pictures and {len(prompts)} prompts: give one prompt, or one for each picture")
        return prompts

    def stream_answer(
        self, patch_embeds: Float[Tensor, "1 patches vision_dim"], question: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """The answer to one question about one picture, in pieces. Raises as `stream`."""
        return self.stream(patch_embeds, self._asked([question])[0], settings, self._shown([question]))

    def _asked(self, questions: Sequence[str], template: str | None = None) -> list[str]:
        language = self.language if template is None else replace(self.language, question_template=template)
        return [language.question_template.replace("{}", question) for question in questions]

    def _shown(self, questions: Sequence[str]) -> Sequence[str] | None:
        """What a Q-Former reads of questions; None: what the language model reads, or nothing."""
        if self.language.qformer_reads == "empty":
            return [""] * len(questions)
        return questions if self.language.qformer_reads == "question" else None

    @torch.inference_mode()
    def say(
        self,
        patch_embeds: Float[Tensor, "images patches vision_dim"],
        prompts: Sequence[str],
        settings: GenerationSettings,
        draws: Float[Tensor, "images answers max_new_tokens"] | None = None,
        instructions: Sequence[str] | None = None,
    ) -> list[str]:
        """What follows each prompt, `num_return_sequences` texts a picture, in order of the pictures.

        Args:
            draws: as `LanguageModel.generate` takes them, to sample a picture's texts alike in any batch.
            instructions: what a Q-Former that reads is shown with each picture; default: the prompts.

        Raises:
            ConfigError: a prompt is too long for the model's context.
        """
        device = patch_embeds.device
        input_ids, attention_mask = self.tokenizer.encode_prompts(list(prompts))
        ids = self.model.language_model.generate(
            self.visual_prompts(patch_embeds, instructions or prompts),
            input_ids.to(device),
            attention_mask.to(device),
            settings,
            draws=draws,
        )
        return self.tokenizer.decode(ids)

    def stream(
        self,
        patch_embeds: Float[Tensor, "1 patches vision_dim"],
        prompt: str,
        settings: GenerationSettings,
        instructions: Sequence[str] | None = None,
    ) -> Iterator[str]:
        """The same for one picture, in pieces as they are generated.

        Raises:
            ConfigError: beams, which know no token for certain before the end; or a prompt too long.
        """
        if settings.num_beams > 1 or settings.num_return_sequences > 1:
            raise ConfigError("a caption is streamed with num_beams and num_return_sequences 1: beams end all at once")
        input_ids, attention_mask = self.tokenizer.encode_prompts([prompt])
        device, streamer = patch_embeds.device, self.tokenizer.streamer()
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    visual = self.visual_prompts(patch_embeds, instructions or [prompt])
                    self.model.language_model.generate(
                        visual, input_ids.to(device), attention_mask.to(device), settings, streamer
                    )
            except BaseException as error:  # handed to whoever reads the pieces
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also when the reader goes before the end
            streamer.abandoned = True
            thread.join()
        if failed:
            raise failed[0]


@dataclass(frozen=True)
class CaptionScores:
    """What a model says of every distinct picture of a data set, beside what people said."""

    image_ids: list[str]
    captions: list[str]
    references: list[list[str]]

    def metrics(self) -> dict[str, float]:
        """`caption_metrics` of the captions."""
        return caption_metrics(self.captions, self.references)

    def results(self) -> list[dict[str, str]]:
        """In COCO's format for results."""
        return [{"image_id": a, "caption": b} for a, b in zip(self.image_ids, self.captions, strict=True)]


def evaluate_captioning(
    model_path: str, source: SourceConfig, settings: GenerationSettings, domains: bool = False
) -> tuple[CaptionScores, dict[str, float]]:
    """Captions of the pictures of `source` by the model saved in `model_path`, and their scores.

    With `domains`, of NoCaps' own file, the scores of each domain too, as "in-domain/cider" and so on.

    Raises:
        CheckpointError: no stage-2 model there. DataError: as `caption_dataset`, or a picture without a domain.
    """
    if settings.num_return_sequences > 1:
        raise ConfigError(f"num_return_sequences is {settings.num_return_sequences}: one caption a picture is scored")
    loaded = open_model(model_path)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    captioner = Captioner.of(loaded)
    transform = transform_for(loaded.model.vision_encoder)
    dataset = CaptionDataset(open_source(source), captioner.tokenizer, transform, train=False)
    domain_of = read_domains(source.path) if domains else {}
    if unknown := [image_id for image_id in dataset.table["image_id"] if domains and str(image_id) not in domain_of]:
        raise DataError(f"{source.path}: {len(unknown)} pictures have no domain, such as {unknown[0]}")
    scores = caption_dataset(captioner, dataset, settings)
    metrics = {"images": float(len(scores.captions))}
    if not domains:
        return scores, metrics | scores.metrics()
    of_each = by_domain(scores.captions, scores.references, [domain_of[image_id] for image_id in scores.image_ids])
    metrics |= of_each.pop("overall")
    return scores, metrics | {f"{name}/{key}": value for name, found in of_each.items() for key, value in found.items()}


def caption_dataset(captioner: Captioner, dataset: CaptionDataset, settings: GenerationSettings) -> CaptionScores:
    """One caption of every distinct picture, with all captions that its records have as references.

    Raises:
        DataError: a picture is broken, or has no caption to compare with.
    """
    # As people wrote them: the scores' own tokenizer does what cleaning is for.
    places = {int(dataset.image_ids[row]): place for place, row in enumerate(dataset.first_records)}
    references: list[list[str]] = [[] for _ in places]
    for image, texts in zip(dataset.image_ids, dataset.table["captions"], strict=True):
        references[places[int(image)]] += [text for text in texts if text.strip()]
    ids = [str(dataset.table[int(row)]["image_id"]) for row in dataset.first_records]
    for image_id, texts in zip(ids, references, strict=True):
        if not texts:
            raise DataError(f"picture {image_id} has no caption to compare with: mend or remove it")
    captions: list[str] = []
    prompt = captioner.tokenizer.prompt
    for patches in patch_batches(captioner.model.vision_encoder, dataset.images(), "captioning"):
        captions += captioner.say(patches, [prompt] * len(patches), settings)
    return CaptionScores(ids, captions, references)
