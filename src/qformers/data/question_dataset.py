"""Questions → examples → batches, every random choice a function of (seed, epoch, index) as in `dataset.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from qformers.data.batch import IGNORED_LABEL, Batch, BrokenImage, SaidAnswers
from qformers.data.config import AnswersAs
from qformers.data.dataset import FeatureReader, broken_image
from qformers.data.images import load_image
from qformers.data.language_text import LanguageTokenizer
from qformers.data.sampling import entropy_generator
from qformers.data.sources import picture_of
from qformers.data.text import CaptionTokenizer, pad
from qformers.data.transforms import TransformConfig, evaluation_transform, train_transform
from qformers.errors import DataError

# What the language model reads, what it is to say of it, and the answer's share of all that people gave.
Answer = tuple[Int[Tensor, " _"], Int[Tensor, " _"], float]


@dataclass(frozen=True)
class Question:
    """One picture with a question for the Q-Former, and answers with their weights for the language model."""

    question_ids: Int[Tensor, " tokens"]
    answers: tuple[Answer, ...]
    image_id: int
    name: str
    pixel_values: Float[Tensor, "3 height width"] | None = None
    patch_embeds: Float[Tensor, "patches vision_dim"] | None = None


class QuestionDataset(TorchDataset):
    """The rows of `open_questions` as examples to train on and to answer.

    With `train` an epoch sees one of a question's answers, drawn from all that people gave, or with `answers_as`
    "weighted" each distinct one at its share of them. Otherwise every distinct answer, weighted. Pictures as in
    `CaptionDataset`, but `features` holds each distinct picture once, as `pictures_of` gives them. Without
    `shows_questions` the Q-Former is given a text without words.
    """

    def __init__(
        self,
        records: datasets.Dataset,
        tokenizer: LanguageTokenizer,
        instructions: CaptionTokenizer,
        template: str,
        transform: TransformConfig,
        train: bool,
        answers_as: AnswersAs = "sampled",
        seed: int = 0,
        features: FeatureReader | None = None,
        shows_questions: bool = True,
    ) -> None:
        self.records = records
        self.tokenizer = tokenizer
        self.instructions = instructions
        self.template = template
        self.transform = transform
        self.train = train
        self.answers_as = answers_as
        self.seed = seed
        self.features = features
        self.shows_questions = shows_questions
        self.image_ids, self.first_records = distinct_pictures(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Question | BrokenImage:
        """The example at `(epoch, index)`."""
        epoch, index = key
        record = self.records[index]
        generator = entropy_generator(self.seed, epoch, index) if self.train else None
        try:
            answers = self._answers(record["question"], record["answers"], generator)
            pictures = self._picture(index, record, generator)
        except DataError as error:
            return broken_image(record["name"], error)
        return Question(
            torch.tensor(self.instructions.encode_one(record["question"] if self.shows_questions else "")),
            answers,
            int(self.image_ids[index]),
            record["name"],
            **pictures,
        )

    def collate(self, examples: Sequence[Question | BrokenImage]) -> Batch:
        """One batch; questions that could not be used are listed, not batched."""
        whole = [example for example in examples if isinstance(example, Question)]
        input_ids, attention_mask = pad([example.question_ids for example in whole], self.instructions.pad_id)
        answers = [(row, *answer) for row, example in enumerate(whole) for answer in example.answers]
        read, read_mask = pad([ids for _, ids, _, _ in answers], self.tokenizer.pad_id)
        pixels = [example.pixel_values for example in whole if example.pixel_values is not None]
        embeds = [example.patch_embeds for example in whole if example.patch_embeds is not None]
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_ids=torch.tensor([example.image_id for example in whole], dtype=torch.int64),
            names=tuple(example.name for example in whole),
            pixel_values=torch.stack(pixels) if pixels else None,
            patch_embeds=torch.stack(embeds) if embeds else None,
            answers=SaidAnswers(
                input_ids=read,
                attention_mask=read_mask,
                labels=pad([labels for _, _, labels, _ in answers], IGNORED_LABEL)[0],
                rows=torch.tensor([row for row, _, _, _ in answers], dtype=torch.int64),
                weights=torch.tensor([weight for _, _, _, weight in answers], dtype=torch.float32),
            ),
            broken=tuple(example for example in examples if isinstance(example, BrokenImage)),
        )

    def _answers(self, question: str, given: list[str], generator: np.random.Generator | None) -> tuple[Answer, ...]:
        answers = [text for answer in given if (text := answer.strip())]
        if not answers:
            raise DataError("it has no answer")
        shares = Counter(answers)
        if generator is not None and self.answers_as == "sampled":
            shares = Counter([answers[int(generator.integers(len(answers)))]])
        prompt = self.template.replace("{}", question)
        total = sum(shares.values())
        return tuple((*self.tokenizer.encode_answer(prompt, answer), count / total) for answer, count in shares.items())

    def _picture(self, index: int, record: dict[str, Any], generator: np.random.Generator | None) -> dict[str, Tensor]:
        """Pixels or features, in a random view if there is a generator."""
        if self.features is not None:
            view = 0 if generator is None else int(generator.integers(self.features.views))
            return {"patch_embeds": self.features.read(int(self.image_ids[index]), view)}
        image = load_image(picture_of(record), record["image"]["path"])
        if generator is None:
            return {"pixel_values": evaluation_transform(image, self.transform)}
        return {"pixel_values": train_transform(image, self.transform, generator)}


def distinct_pictures(records: datasets.Dataset) -> tuple[Int[np.ndarray, " records"], Int[np.ndarray, " pictures"]]:
    """The number of each record's picture, counted by first appearance, and the first record of each."""
    numbers: dict[str, int] = {}
    first: list[int] = []
    places = np.empty(len(records), dtype=np.int64)
    for row, image_id in enumerate(records["image_id"]):
        if image_id not in numbers:
            numbers[image_id] = len(first)
            first.append(row)
        places[row] = numbers[image_id]
    return places, np.array(first, dtype=np.int64)


def pictures_of(records: datasets.Dataset) -> datasets.Dataset:
    """The distinct pictures of questions, as a feature store holds them: `image` and `name`."""
    _, first = distinct_pictures(records)
    pictures = records.select(first.tolist())
    return pictures.select_columns(["image", "image_id"]).rename_column("image_id", "name")
