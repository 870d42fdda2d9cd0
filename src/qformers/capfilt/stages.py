"""The three stages that both engines run: read, caption, rank. What goes through them is a part of a shard."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformers.capfilt.candidates import RANKED, Account, Candidate, choose, gather
from qformers.capfilt.captioner import CaptionWriter, open_captioner
from qformers.capfilt.config import RankingConfig, SamplingConfig
from qformers.capfilt.encoding import EncodesPictures, PictureTransform
from qformers.capfilt.pictures import Picture, Pictures
from qformers.capfilt.ranker import OwnRanker, Ranker, open_ranker
from qformers.data.batch import BrokenImage
from qformers.data.config import SourceConfig
from qformers.errors import ConfigError, DataError, QFormersError
from qformers.models.sampling import draws_for

Key = tuple[int, int]  # shard, and which part of it


@dataclass(frozen=True)
class Plan:
    """What every process needs to know; it is sent to each."""

    source: SourceConfig
    captioner: str
    ranker: str
    sampling: SamplingConfig
    ranking: RankingConfig
    threads: int
    pictures: int
    shard_pictures: int
    batch_size: int
    transforms: dict[str, PictureTransform]
    """By encoder key: how pictures are read for it. One that the captioner leaves to others is not in it twice."""
    reused: bool
    """Whether the ranker or the judge reads what the captioner's image encoder gives."""

    def places(self, key: Key) -> range:
        """The pictures of a part."""
        shard, part = key
        start = shard * self.shard_pictures + part * self.batch_size
        return range(start, min(start + self.batch_size, (shard + 1) * self.shard_pictures, self.pictures))

    def keys(self, shard: int) -> list[Key]:
        """The parts of a shard."""
        held = min(self.shard_pictures, self.pictures - shard * self.shard_pictures)
        return [(shard, part) for part in range(-(-held // self.batch_size))]


@dataclass(frozen=True)
class Models:
    """The models of one device."""

    captioner: CaptionWriter
    ranker: Ranker
    judge: OwnRanker | None

    @property
    def all(self) -> list[EncodesPictures]:
        return [self.captioner, self.ranker, *([] if self.judge is None else [self.judge])]


@dataclass(frozen=True)
class ReadPart:
    """Pictures as each encoder wants them, by encoder key; `broken` ones are in no batch."""

    key: Key
    pictures: list[Picture]
    broken: list[Account]
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Span:
    """When a captioner was at work, in seconds of its machine's clock; it was `ready` from then on."""

    worker: str
    ready: float
    start: float
    end: float


@dataclass(frozen=True)
class CaptionedPart:
    """The same with the captions written; `encoded` holds what an encoder gave that others read too."""

    key: Key
    pictures: list[Picture]
    broken: list[Account]
    inputs: dict[str, Tensor]
    encoded: dict[str, Tensor]
    captions: list[list[str]]
    span: Span


@dataclass(frozen=True)
class RankedPart:
    """Done: what became of every picture of the part, in order."""

    key: Key
    accounts: list[Account]
    span: Span


@dataclass(frozen=True)
class FailedPart:
    """A stage failed on it. `error` is one that trying again would not mend."""

    key: Key
    reason: str
    error: QFormersError | None = None


def attempt(stage: Callable[[Any], Any], part: Any) -> Any:
    """`stage(part)`; a FailedPart where it raises, and one that is given is passed on."""
    if isinstance(part, FailedPart):
        return part
    key = part if isinstance(part, tuple) else part.key
    try:
        return stage(part)
    except QFormersError as error:
        return FailedPart(key, str(error), error)
    except Exception as error:  # counted, tried again a bounded number of times, then named: run.py
        return FailedPart(key, " ".join(f"{type(error).__name__}: {error}".split()))


def open_models(captioner: str, ranker: str, sampling: SamplingConfig, judge: str | None, device: str) -> Models:
    """The models of one device.

    Raises:
        ConfigError, CheckpointError: one of them cannot be used as what it is to be.
    """
    ranks = open_ranker(ranker, device)
    return Models(open_captioner(captioner, sampling, device), ranks, open_judge(judge, ranker, ranks, device))


def open_judge(judge: str | None, ranker: str, ranks: Ranker, device: str) -> OwnRanker | None:
    """The judge, if there is one: the `ranks` already open where it is the ranker. Raises as `open_models`."""
    if judge is None:
        return None
    found = ranks if judge == ranker else open_ranker(judge, device)
    if not isinstance(found, OwnRanker):
        raise ConfigError(f"{judge}: has no ITM head, so it cannot judge: give a stage-1 run")
    return found


class ReadStage:
    """Pictures from the source, decoded once and transformed for each encoder."""

    def __init__(self, plan: Plan, pictures: Pictures) -> None:
        self.plan = plan
        self.pictures = pictures

    def __call__(self, key: Key) -> ReadPart:
        whole, broken = [], []
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.plan.transforms}
        for place in self.plan.places(key):
            facts, image = self.pictures.read(place)
            if isinstance(image, BrokenImage):
                broken.append(Account(place, facts.name, facts.image_id, facts.path, image.reason))
                continue
            whole.append(facts)
            pixels: dict[PictureTransform, Tensor] = {}
            for name, transform in self.plan.transforms.items():
                if transform not in pixels:
                    pixels[transform] = transform(image)
                inputs[name].append(pixels[transform])
        return ReadPart(key, whole, broken, {name: torch.stack(rows) for name, rows in inputs.items() if rows})


class CaptionStage:
    """Captions by nucleus sampling, a picture's by its own seed (its id and the run's)."""

    def __init__(self, plan: Plan, captioner: CaptionWriter) -> None:
        self.plan = plan
        self.captioner = captioner
        self.worker = f"{socket.gethostname()} {os.getpid()}"
        self.ready = time.monotonic()

    def __call__(self, part: ReadPart) -> CaptionedPart:
        start, sampling = time.monotonic(), self.plan.sampling
        captions: list[list[str]] = []
        inputs, encoded = dict(part.inputs), {}
        if part.pictures:
            seen = self.captioner.encode(inputs.pop(self.captioner.encoder_key))
            ids = [picture.image_id for picture in part.pictures]
            captions = self.captioner.write(
                seen, draws_for(ids, sampling.seed, sampling.captions, sampling.max_new_tokens)
            )
            encoded = {self.captioner.encoder_key: seen.cpu()} if self.plan.reused else {}
        span = Span(self.worker, self.ready, start, time.monotonic())
        return CaptionedPart(part.key, part.pictures, part.broken, inputs, encoded, captions, span)


class RankStage:
    """Written and found captions scored against their picture, and the best chosen."""

    def __init__(self, plan: Plan, ranker: Ranker, judge: OwnRanker | None) -> None:
        self.plan = plan
        self.ranker = ranker
        self.judge = judge

    def __call__(self, part: CaptionedPart) -> RankedPart:
        script = self.plan.ranking.script
        candidates = [
            gather(picture.web, written, script) for picture, written in zip(part.pictures, part.captions, strict=True)
        ]
        texts = [[one.caption for one in of_picture if one.verdict in RANKED] for of_picture in candidates]
        accounts = list(part.broken)
        if part.pictures:
            encoded = dict(part.encoded)
            scores = self.ranker.score(_encoded_by(self.ranker, part, encoded), texts)
            matches = [None] * len(texts)
            if self.judge is not None:
                matches = self.judge.match(_encoded_by(self.judge, part, encoded), texts)
            for picture, found, of_picture, agreed in zip(part.pictures, candidates, scores, matches, strict=True):
                self._check_finite(picture, found, of_picture)
                chosen = choose(found, of_picture, agreed, self.plan.ranking)
                accounts.append(Account(picture.place, picture.name, picture.image_id, picture.path, None, chosen))
        return RankedPart(part.key, sorted(accounts, key=lambda account: account.place), part.span)

    def _check_finite(self, picture: Picture, candidates: list[Candidate], scores: list[float]) -> None:
        ranked = [one for one in candidates if one.verdict in RANKED]
        for candidate, score in zip(ranked, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"{self.plan.ranker}: its score of {picture.name} and {candidate.caption[:60]!r} is {score}: "
                    "a ranker must give finite scores; use another, or its weights in float32"
                )


def _encoded_by(model: EncodesPictures, part: CaptionedPart, encoded: dict[str, Tensor]) -> Tensor:
    """What the model's encoder gives of the part's pictures, from before if it has been computed."""
    if model.encoder_key not in encoded:
        encoded[model.encoder_key] = model.encode(part.inputs[model.encoder_key])
    return encoded[model.encoder_key]
