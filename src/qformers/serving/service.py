"""What the service does with pictures and texts: the Python API's calls, batched, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch

from qformers.errors import ConfigError, QFormersError
from qformers.predictor import Predictor, PreparedImage, load
from qformers.search.index import Hit, Index
from qformers.serving.batching import Batcher
from qformers.serving.cache import CachingPredictor
from qformers.serving.config import ServeConfig
from qformers.serving.errors import ServiceError
from qformers.serving.metrics import Metrics
from qformers.serving.pictures import prepare

logger = logging.getLogger(__name__)

DECODERS = 2  # pictures decoded at a time: at the limit of pixels one takes some hundred MB
Generation = dict[str, Any]  # fields of GenerationSettings, and "seed"


class Service:
    """A model that speaks, one that compares, an index: whichever there are. Every call is safe to await at once.

    Calls take the content of picture files, checked before (`pictures.from_text`), and raise ServiceError or a
    QFormersError.
    """

    def __init__(
        self,
        config: ServeConfig,
        speaker: CachingPredictor | None,
        matcher: CachingPredictor | None,
        index: Index | None = None,
    ) -> None:
        self.config = config
        self.speaker = speaker
        self.matcher = matcher
        self.index = index
        self.metrics = Metrics()
        self.metrics.watch([model for model in (speaker, matcher) if model is not None])
        self.batcher = Batcher(config.batch_window_seconds, config.max_batch, self.metrics)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def close(self) -> None:
        """Let the threads end."""
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def caption(self, contents: Sequence[bytes], prompt: str | None, generation: Generation) -> list[list[str]]:
        """Captions of each picture, `num_return_sequences` of them."""
        speaker = self.speaking()
        pictures = await self._prepare(speaker, contents)

        def say(pictures: list[PreparedImage], prompts: list[str], settings: Generation) -> list[str]:
            return speaker.caption(pictures, None if prompt is None else prompts, **settings)

        return await self._generate(
            "default" if prompt is None else "prompt", say, pictures, [prompt or ""], generation
        )

    async def ask(self, contents: Sequence[bytes], questions: Sequence[str], generation: Generation) -> list[str]:
        """An answer to each question; one picture for all questions, one question for all pictures, or pairs."""
        speaker = self.speaking()
        pictures = await self._prepare(speaker, contents)

        def say(pictures: list[PreparedImage], questions: list[str], settings: Generation) -> list[str]:
            return speaker.ask(pictures, questions, **settings)

        return [answers[0] for answers in await self._generate("ask", say, pictures, questions, generation)]

    async def stream(
        self, content: bytes, prompt: str | None, generation: Generation, question: str | None = None
    ) -> AsyncGenerator[str, None]:
        """A caption, or the answer to a question, piece by piece. Whoever stops reading stops the generation."""
        speaker = self.speaking()
        [picture] = await self._prepare(speaker, [content])
        settings, seed = _without_seed(generation)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop, left = asyncio.get_running_loop(), Event()

        def run(rows: list[PreparedImage]) -> list[None]:
            _seed(seed)
            if question is None:
                said = speaker.stream_caption(rows[0], prompt, **settings)
            else:
                said = speaker.stream_answer(rows[0], question, **settings)
            for piece in said:
                if left.is_set():
                    break
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            said.close()  # pyright: ignore[reportAttributeAccessIssue] it is a generator
            return [None]

        job = asyncio.create_task(self.batcher.submit(object(), run, [picture]))
        job.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await job
        finally:
            left.set()
            job.cancel()

    async def match(self, contents: Sequence[bytes], texts: Sequence[str]) -> list[list[float]]:
        """The probability that picture and text match, of every picture with every text."""
        matcher = self.comparing()
        _check_lengths(matcher, texts)
        pictures = await self._prepare(matcher, contents)

        def run(rows: list[tuple[PreparedImage, str]]) -> list[float]:
            return matcher.match([picture for picture, _ in rows], [text for _, text in rows]).tolist()

        pairs = [(picture, text) for picture in pictures for text in texts]
        found = await self.batcher.submit("match", run, pairs)
        return [found[start : start + len(texts)] for start in range(0, len(found), len(texts))]

    async def embed_images(self, contents: Sequence[bytes]) -> list[list[list[float]]]:
        """ITC features of each picture, one for each query."""
        matcher = self.comparing()

        def run(rows: list[PreparedImage]) -> list[list[list[float]]]:
            return matcher.encode_patches(matcher.patches(rows)).features.tolist()

        return await self.batcher.submit("embed_images", run, await self._prepare(matcher, contents))

    async def embed_texts(self, texts: Sequence[str]) -> list[list[float]]:
        """The ITC feature of each text."""
        matcher = self.comparing()
        _check_lengths(matcher, texts)
        return await self.batcher.submit(
            "embed_texts", lambda rows: matcher.encode_text(rows).features.tolist(), list(texts)
        )

    async def search(self, text: str | None, contents: Sequence[bytes], options: dict[str, Any]) -> list[Hit]:
        """`Index.search` by text, by picture or by both."""
        index, matcher = self.searching(), self.comparing()
        _check_lengths(matcher, [] if text is None else [text])
        pictures = await self._prepare(matcher, contents)

        def run(rows: list[PreparedImage | None]) -> list[list[Hit]]:
            try:
                return [index.search(text, picture, **options) for picture in rows]
            except ConfigError:
                raise
            except QFormersError as error:  # its message names files of this machine
                logger.error("search: %s", error)
                raise ServiceError("index_changed", "a picture of the index cannot be read: index again") from error

        [hits] = await self.batcher.submit(object(), run, [pictures[0] if pictures else None])
        return hits

    async def attention(self, content: bytes, text: str | None, by_speaker: bool) -> list[list[list[float]]]:
        """Where each query of a model looks in its last cross-attending block: queries × rows × columns."""
        model = self.speaking() if by_speaker else self.comparing()
        _check_lengths(model, [] if text is None else [text])
        pictures = await self._prepare(model, [content])
        [maps] = await self.batcher.submit(
            object(), lambda rows: [model.attention(row, text)[-1].tolist() for row in rows], pictures
        )
        return maps

    async def decode(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work` in a thread that decodes pictures."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *arguments)

    def speaking(self) -> CachingPredictor:
        """The model of stage 2. Raises ServiceError where none is served."""
        if self.speaker is None:
            raise ServiceError("not_served", "no model here speaks: serve one of stage 2 (--model)")
        return self.speaker

    def comparing(self) -> CachingPredictor:
        """The model of stage 1. Raises ServiceError where none is served."""
        if self.matcher is None:
            raise ServiceError(
                "not_served", "no model here compares pictures with texts: serve one of stage 1 (--model)"
            )
        return self.matcher

    def searching(self) -> Index:
        """The index. Raises ServiceError where there is none."""
        if self.index is None:
            raise ServiceError("not_served", "there is no index here: serve one (--index)")
        return self.index

    async def _prepare(self, model: CachingPredictor, contents: Sequence[bytes]) -> list[PreparedImage]:
        """The pictures as `model` wants them; one that is given twice is one object."""
        prepared: dict[bytes, PreparedImage] = {}
        for number, content in enumerate(contents, start=1):
            if content not in prepared:
                limit = self.config.max_pixels
                prepared[content] = await self.decode(prepare, model, content, f"picture {number}", limit)
        return [prepared[content] for content in contents]

    async def _generate(
        self,
        kind: str,
        say: Callable[[list[PreparedImage], list[str], Generation], list[str]],
        pictures: list[PreparedImage],
        words: Sequence[str],
        generation: Generation,
    ) -> list[list[str]]:
        """What `say` says of each picture with its words, in batches of one `kind` and one generation."""
        settings, seed = _without_seed(generation)
        count = settings.get("num_return_sequences", 1)

        def run(rows: list[tuple[PreparedImage, str]]) -> list[list[str]]:
            _seed(seed)
            said = say([picture for picture, _ in rows], [word for _, word in rows], settings)
            return [said[start : start + count] for start in range(0, len(said), count)]

        # What is drawn depends on the whole batch, so a sample is drawn alone.
        key = object() if settings.get("top_p") is not None else (kind, *sorted(settings.items()))
        return await self.batcher.submit(key, run, _pairs(pictures, list(words)))


def open_service(models: Sequence[str], index: str | None, config: ServeConfig) -> Service:
    """The service of one or two models and an index.

    A stage-2 model speaks, a stage-1 model compares; without a stage-1 model the index's own does.

    Raises:
        CheckpointError: no such model. DataError: no such index. ConfigError: two models of one stage.
    """
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speaker = matcher = matcher_path = opened = None
    for path in models:
        model = CachingPredictor(load(path, device, dtype).loaded, config.kept_features_bytes)
        speaks = model.loaded.language is not None
        if (speaker if speaks else matcher) is not None:
            raise ConfigError(f"{path}: a second model of its stage: give at most one of stage 1 and one of stage 2")
        if speaks:
            speaker = model
        else:
            matcher, matcher_path = model, path
    if index is not None:
        # With the weights as they were saved: an index knows its model by their bits.
        opened = Index.open(index, None if matcher_path is None else load(matcher_path, device))
        if matcher is None:
            opened.model.model.to(device, dtype)
            matcher = CachingPredictor(opened.model.loaded, config.kept_features_bytes)
        opened.model = matcher
    return Service(config, speaker, matcher, opened)


def _pairs(pictures: list[PreparedImage], words: list[str]) -> list[tuple[PreparedImage, str]]:
    """Each picture with its words: one of either, or as many of both."""
    if len(pictures) == 1:
        pictures = pictures * len(words)
    elif len(words) == 1:
        words = words * len(pictures)
    if len(pictures) != len(words):
        raise ServiceError(
            "invalid_request",
            f"{len(pictures)} pictures and {len(words)} questions: give one of either, or as many of both",
        )
    return list(zip(pictures, words, strict=True))


def _check_lengths(model: Predictor, texts: Sequence[str]) -> None:
    """Raise DataError for a text of which the Q-Former would read only the beginning."""
    for text in texts:
        model.tokenizer.check_length(text)


def _without_seed(generation: Generation) -> tuple[Generation, int | None]:
    settings = dict(generation)
    return settings, settings.pop("seed", None)


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)
