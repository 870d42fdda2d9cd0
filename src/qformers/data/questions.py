"""Questions about pictures with people's answers: VQAv2, OK-VQA and GQA as published, or JSONL → one table."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from qformers.data.config import SourceConfig
from qformers.data.sources import quiet
from qformers.errors import ConfigError, DataError

_CACHE_VERSION = 1  # part of every cache key: raise it when a row would be read differently from the same file
_FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "question": datasets.Value("string"),
        "question_id": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "question_type": datasets.Value("string"),
        "answer_type": datasets.Value("string"),
        "image_id": datasets.Value("string"),
        "name": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """The usable rows of a source, and for each reason why some are not, how many and the first.

    Columns: `image` {path, bytes}, `question`, `question_id`, `answers` (empty where the file has none),
    `question_type` and `answer_type` (empty where the file says none), `image_id`, `name` (for errors).
    """

    records: datasets.Dataset
    left_out: dict[str, tuple[int, str]]

    @property
    def count_left_out(self) -> int:
        return sum(count for count, _ in self.left_out.values())


def open_questions(config: SourceConfig, need_answers: bool = True) -> Questions:
    """The questions of a source, no picture decoded. What cannot be asked is left out, counted, and said in a warning.

    Known layouts: VQAv2's and OK-VQA's {"questions": […]} with `annotations` beside it, GQA's {id: {"question",
    "imageId", "answer", …}}, a JSON list or JSONL of {"image", "question", "answers"}.

    Args:
        need_answers: False for a test set, whose answers nobody has.

    Raises:
        DataError: no such file, not JSON, another layout, or nothing that can be asked.
        ConfigError: a split, a format, streaming or a weight.
    """
    if config.split is not None or config.format not in ("auto", "json", "jsonl"):
        raise ConfigError(
            f"{config.path}: split {config.split!r} and format {config.format!r}: a file of questions has no "
            "splits, and its layout is found by content: leave both out"
        )
    if config.stream or config.weight is not None:
        raise ConfigError(
            f"{config.path}: stream and weight are of captions: questions are one table and shuffled as one, leave "
            "both out"
        )
    files = [Path(config.path), *([Path(config.annotations)] if config.annotations else [])]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file")
    facts = [(str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    stamp = hashlib.sha256(repr((_CACHE_VERSION, facts)).encode()).hexdigest()[:16]
    with quiet():
        try:
            rows = datasets.Dataset.from_generator(
                _rows,
                features=_FEATURES,
                gen_kwargs={"config": config, "need_answers": need_answers, "stamp": stamp},
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, DataError):
                raise error.__cause__ from error
            raise DataError(f"{config.path}: cannot be read: {error.__cause__ or error}") from error
        except ValueError as error:
            raise DataError(f"{config.path}: holds no questions ({error})") from error
        return _usable(rows, config)


def _usable(rows: datasets.Dataset, config: SourceConfig) -> Questions:
    problems, names = list(rows["problem"]), list(rows["name"])
    paths = [image["path"] for image in rows["image"]]
    there = {path: os.path.isfile(path) for path in set(paths)}
    left_out: dict[str, tuple[int, str]] = {}
    kept = []
    for row, (problem, path) in enumerate(zip(problems, paths, strict=True)):
        why = problem or ("" if there[path] else "have a picture that does not exist")
        if not why:
            kept.append(row)
            continue
        count, first = left_out.get(why, (0, f"{names[row]}: {path}" if path and not problem else names[row]))
        left_out[why] = (count + 1, first)
    reasons = "; ".join(f"{count} {why} (first: {first})" for why, (count, first) in left_out.items())
    if not kept:
        raise DataError(f"{config.path}: none of {len(rows)} questions can be asked: {reasons}")
    if left_out:
        logger.warning("%s: %d of %d rows left out: %s", config.path, len(rows) - len(kept), len(rows), reasons)
        rows = rows.select(kept)
    return Questions(rows.remove_columns("problem"), left_out)


def _rows(config: SourceConfig, need_answers: bool, stamp: str) -> Iterator[dict[str, Any]]:
    """Every row of the file, `problem` saying what keeps it from being asked. `stamp` is part of the cache's key."""
    path = Path(config.path)
    content = _read(path)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        rows = _vqa_rows(content, config)
    elif isinstance(content, dict) and all(isinstance(row, dict) and "imageId" in row for row in content.values()):
        rows = _gqa_rows(content, config)
    elif isinstance(content, list):
        rows = _plain_rows(content, config)
    else:
        keys = ", ".join(list(content)[:6]) if isinstance(content, dict) else "no object"
        raise DataError(
            f'{path}: unknown layout ({keys}); known are VQAv2\'s {{"questions": […]}}, '
            'GQA\'s {id: {"imageId", …}}, and rows of image, question and answers'
        )
    seen: set[str] = set()
    for number, row in enumerate(rows):
        problem = row.pop("problem", "") or _problem(row, need_answers)
        if not problem and row["question_id"] and row["question_id"] in seen:
            problem = "have a question_id that came before"
        seen.add(row["question_id"])
        question_id = row["question_id"] or str(number)
        name = f"question {question_id}"
        answers = row["answers"] if not problem and row["answers"] else []
        text = row["question"] if isinstance(row["question"], str) else ""
        yield {
            **row,
            "question": text.strip(),
            "question_id": question_id,
            "answers": answers,
            "image": {"path": row["image"], "bytes": None},
            "name": name,
            "problem": problem,
        }


def _problem(row: Mapping[str, Any], need_answers: bool) -> str:
    if not row["image"]:
        return "have no picture"
    if not isinstance(row["question"], str) or not row["question"].strip():
        return "have an empty question"
    answers = row["answers"]
    if answers is None or answers == []:
        return "have no answer" if need_answers else ""
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "have answers that are not strings"
    return "have an empty answer" if not any(answer.strip() for answer in answers) else ""


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return [_line(line, path, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def _line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is not a JSON object: {line[:60]!r}")
    return row


def _vqa_rows(content: Mapping[str, Any], config: SourceConfig) -> Iterator[dict[str, Any]]:
    """VQAv2's and OK-VQA's questions, joined with the annotations that belong to them."""
    subset = content.get("data_subtype", "")
    annotations: dict[Any, dict[str, Any]] = {}
    if config.annotations:
        found = _read(Path(config.annotations))
        listed = found.get("annotations") if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise DataError(f'{config.annotations}: holds no {{"annotations": […]}} of VQAv2 or OK-VQA')
        annotations = {row.get("question_id"): row for row in listed}
    for row in content["questions"]:
        annotation = annotations.pop(row.get("question_id"), None)
        yield {
            "image": _image_path(config, row.get("image_id"), subset),
            "question": row.get("question"),
            "question_id": str(row.get("question_id", "")),
            "answers": None if annotation is None else _answers_of(annotation),
            "question_type": (annotation or {}).get("question_type") or "",
            "answer_type": (annotation or {}).get("answer_type") or "",
            "image_id": str(row.get("image_id", "")),
        }
    for question_id in annotations:
        yield _row("", None, str(question_id)) | {"problem": "are annotations without a question"}


def _answers_of(annotation: Mapping[str, Any]) -> Any:
    answers = annotation.get("answers")
    if not isinstance(answers, list):
        return answers
    return [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]


def _gqa_rows(content: Mapping[str, Mapping[str, Any]], config: SourceConfig) -> Iterator[dict[str, Any]]:
    for question_id, row in content.items():
        types = row.get("types") or {}
        answer = row.get("answer")
        yield _row(_image_path(config, row["imageId"], ""), row.get("question"), question_id) | {
            "answers": None if answer is None else [answer],
            "question_type": types.get("semantic") or "",
            "answer_type": types.get("structural") or "",
            "image_id": str(row["imageId"]),
        }


def _plain_rows(content: Sequence[Any], config: SourceConfig) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{config.path}: row {number} is no object: {row!r:.60}")
        image = row.get(config.image_column, "") or ""
        answers = row.get("answers", row.get("answer"))
        path = os.path.join(config.images or str(Path(config.path).parent), image) if image else ""
        yield _row(path, row.get("question"), str(row.get("question_id", ""))) | {
            "answers": [answers] if isinstance(answers, str) else answers,
            "question_type": str(row.get("question_type") or ""),
            "answer_type": str(row.get("answer_type") or ""),
            "image_id": str(row.get(config.id_column) or image),
        }


def _row(image: str, question: Any, question_id: str) -> dict[str, Any]:
    return {
        "image": image,
        "question": question,
        "question_id": question_id,
        "answers": None,
        "question_type": "",
        "answer_type": "",
        "image_id": "",
    }


def _image_path(config: SourceConfig, image_id: Any, subset: str) -> str:
    """Where a picture that is only numbered lies: COCO_train2014_000000000009.jpg, or GQA's 2386621.jpg."""
    if image_id in (None, ""):
        return ""
    name = config.image_name
    if name is None:
        name = f"COCO_{subset}_{{id:0>12}}.jpg" if subset else "{id}.jpg"
    try:
        return os.path.join(config.images or str(Path(config.path).parent), name.format(id=str(image_id)))
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"image_name is {config.image_name!r}: write {{id}} or {{id:0>12}} for the number") from error
