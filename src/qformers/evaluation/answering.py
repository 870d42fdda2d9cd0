"""A stage-2 model's answers to a set of questions: generated, or ranked by likelihood, and their scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qformers.convert.run import open_model
from qformers.data.batch import IGNORED_LABEL
from qformers.data.config import SourceConfig, TransformConfig
from qformers.data.dataset import FeatureReader
from qformers.data.images import load_image
from qformers.data.question_dataset import distinct_pictures
from qformers.data.questions import open_questions
from qformers.data.sources import picture_of
from qformers.data.text import pad
from qformers.data.transforms import evaluation_transform, transform_for
from qformers.errors import ConfigError, DataError
from qformers.evaluation.captioning import Captioner
from qformers.evaluation.pictures import PICTURES_AT_ONCE
from qformers.evaluation.vqa_metrics import Metric, fitting_metric, score_answers
from qformers.models.config import GenerationSettings
from qformers.models.reader import at_least_fp32

ROWS_AT_ONCE = 64  # of questions, or of candidates, in the language model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """What a model says to every question of a set that could be asked, beside what people said."""

    question_ids: list[str]
    answers: list[str]
    people: list[list[str]]
    types: dict[str, list[str]]
    left_out: int

    def metrics(self, metric: Metric | None = None) -> dict[str, float]:
        """`questions`, `left_out`, and `score_answers` where the set has answers; None: `fitting_metric`."""
        counts = {"questions": float(len(self.answers)), "left_out": float(self.left_out)}
        if not all(self.people):
            return counts
        return counts | score_answers(self.answers, self.people, self.types, metric or fitting_metric(self.people))

    def submission(self) -> list[dict[str, str | int]]:
        """In VQAv2's format for results; ids that are whole numbers are numbers, as there."""
        return [
            {"question_id": int(name) if name.isdigit() else name, "answer": answer}
            for name, answer in zip(self.question_ids, self.answers, strict=True)
        ]


def evaluate_vqa(
    model_path: str,
    source: SourceConfig,
    settings: GenerationSettings,
    template: str | None = None,
    candidates: Sequence[str] | None = None,
    need_answers: bool = True,
) -> Answered:
    """The answers of the model saved in `model_path` to the questions of `source`.

    Args:
        template: how the language model is asked; None: as it was trained.
        candidates: answer with the likeliest of these instead of generating.
        need_answers: False for a test set whose answers nobody has.

    Raises:
        CheckpointError: no stage-2 model there. DataError: no question that can be asked. ConfigError: settings.
    """
    if settings.num_return_sequences > 1:
        raise ConfigError(f"num_return_sequences is {settings.num_return_sequences}: one answer a question is scored")
    questions = open_questions(source, need_answers)
    loaded = open_model(model_path)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    captioner = Captioner.of(loaded)
    transform = transform_for(loaded.model.vision_encoder)
    answered = answer_questions(
        captioner, questions.records, transform, settings, template=template, candidates=candidates
    )
    return Answered(**{**vars(answered), "left_out": answered.left_out + questions.count_left_out})


@torch.inference_mode()
def answer_questions(
    captioner: Captioner,
    records: datasets.Dataset,
    transform: TransformConfig,
    settings: GenerationSettings,
    *,
    template: str | None = None,
    candidates: Sequence[str] | None = None,
    features: FeatureReader | None = None,
) -> Answered:
    """One answer to each question: a picture is encoded once, and a question about it asked once if it stands there
    several times. `features` as in `QuestionDataset`.

    Questions about a picture that cannot be read are left out, counted and said in a warning.

    Raises:
        DataError: no picture at all can be read, or a candidate is empty.
    """
    for number, candidate in enumerate(candidates or ()):
        if not candidate.strip():
            raise DataError(f"candidate answer {number + 1} is empty")
    texts: list[str] = records["question"][:]
    first: dict[tuple[str, str], int] = {}
    pairs = zip(records["image_id"], texts, strict=True)
    equal = [first.setdefault(pair, row) for row, pair in enumerate(pairs)]
    said: dict[int, str] = {}
    broken: list[DataError] = []
    once = np.array(list(first.values()))
    for rows, patches in _with_patches(captioner, records, once, transform, features, broken):
        asked = [texts[row] for row in rows]
        if candidates is None:
            answers = captioner.answer(patches, asked, settings, template)
        else:
            scores = rank_answers(captioner, patches, asked, candidates, template)
            answers = [candidates[int(best)] for best in scores.argmax(dim=1)]
        said |= dict(zip(rows, answers, strict=True))
    said |= {row: said[earlier] for row, earlier in enumerate(equal) if earlier in said}
    if not said:
        raise DataError(f"none of the pictures can be read: {broken[0]}")
    if broken:
        logger.warning(
            "%d pictures cannot be read, %d questions about them left out, first: %s",
            len(broken),
            len(texts) - len(said),
            broken[0],
        )
    kept = sorted(said)
    columns = {name: records[name][:] for name in ("question_id", "answers", "question_type", "answer_type")}
    chosen = {name: [column[row] for row in kept] for name, column in columns.items()}
    types = {name: chosen[name] for name in ("answer_type", "question_type")}
    answers = [said[row] for row in kept]
    return Answered(chosen["question_id"], answers, chosen["answers"], types, len(texts) - len(kept))


def rank_answers(
    captioner: Captioner,
    patch_embeds: Float[Tensor, "questions patches vision_dim"],
    questions: Sequence[str],
    candidates: Sequence[str],
    template: str | None = None,
) -> Float[Tensor, "questions candidates"]:
    """The log-likelihood of each candidate, its end token included, as the answer to each question."""
    visual_prompts, prompts = captioner.question_inputs(patch_embeds, questions, template)
    device, tokenizer = patch_embeds.device, captioner.tokenizer
    pairs = [(row, candidate) for row in range(len(questions)) for candidate in candidates]
    scores = []
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        chunk = pairs[start : start + ROWS_AT_ONCE]
        encoded = [tokenizer.encode_answer(prompts[row], candidate) for row, candidate in chunk]
        input_ids, attention_mask = pad([ids for ids, _ in encoded], tokenizer.pad_id)
        labels = pad([said for _, said in encoded], IGNORED_LABEL)[0].to(device)
        target_mask = labels != IGNORED_LABEL
        logits = captioner.model.language_model(
            visual_prompts[[row for row, _ in chunk]],
            input_ids.to(device),
            attention_mask.to(device),
            labels.masked_fill(~target_mask, 0),
            target_mask,
        )
        chances = at_least_fp32(logits).log_softmax(dim=1).gather(1, labels[target_mask][:, None])[:, 0]
        scores.append(chances.new_zeros(len(chunk)).index_add(0, target_mask.nonzero()[:, 0], chances))
    return torch.cat(scores).unflatten(0, (len(questions), len(candidates)))


def _with_patches(
    captioner: Captioner,
    records: datasets.Dataset,
    asked: Int[np.ndarray, " asked"],
    transform: TransformConfig,
    features: FeatureReader | None,
    broken: list[DataError],
) -> Iterator[tuple[list[int], Float[Tensor, "questions patches vision_dim"]]]:
    """The rows `asked` with the patch embeddings of their pictures; unreadable pictures go into `broken`."""
    encoder = captioner.model.vision_encoder
    device = captioner.model.qformer.query_tokens.device
    places, first = distinct_pictures(records)
    starts = range(0, len(first), PICTURES_AT_ONCE)
    for start in track(starts, "answering", console=Console(stderr=True), transient=True):
        read: dict[int, Tensor] = {}
        for picture in range(start, min(start + PICTURES_AT_ONCE, len(first))):
            try:
                if features is not None:
                    read[picture] = features.read(picture, 0)
                else:
                    record = records[int(first[picture])]
                    read[picture] = evaluation_transform(
                        load_image(picture_of(record), record["image"]["path"]), transform
                    )
            except DataError as error:
                broken.append(error)
        if not read:
            continue
        stacked = torch.stack(list(read.values())).to(device)
        patches = stacked if features is not None else encoder(stacked)
        position = {picture: number for number, picture in enumerate(read)}
        rows = asked[np.isin(places[asked], list(read))].tolist()
        for chunk in range(0, len(rows), ROWS_AT_ONCE):
            of_chunk = rows[chunk : chunk + ROWS_AT_ONCE]
            yield of_chunk, patches[[position[int(places[row])] for row in of_chunk]]
