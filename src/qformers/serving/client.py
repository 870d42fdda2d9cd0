"""A small client: the Python contract's calls, answered by a service. It needs neither torch nor a model."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from qformers.errors import QFormersError

Picture = str | Path | bytes  # a file, or its content


class ServiceRefused(QFormersError):
    """The service answered with an error; `code` is one of docs/serving.md's, `status` HTTP's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Client:
    """Calls of one service; safe to use from several threads.

    Every call takes one item or many, as `qformers.load`'s models do, and raises ServiceRefused where the service
    refuses, QFormersError where it cannot be reached.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout_seconds: float = 60.0
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # Proxies of the environment are for other machines than those that serve models.
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What is served: each model's `id` and what it `does`."""
        return self._call("GET", "/v1/models")["data"]

    def caption(self, images: Picture | Sequence[Picture], prompt: str | None = None, **generation: Any) -> list[str]:
        """One caption each; with `num_return_sequences` = n, n one after another."""
        asked = {"images": _encoded(images), "prompt": prompt, **generation}
        captions = self._call("POST", "/v1/caption", asked)["captions"]
        return [caption for several in captions for caption in several]

    def ask(self, images: Picture | Sequence[Picture], questions: str | Sequence[str], **generation: Any) -> list[str]:
        """An answer to each question: one of either, or as many of both."""
        asked = {"images": _encoded(images), "questions": _many(questions), **generation}
        return self._call("POST", "/v1/ask", asked)["answers"]

    def match(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> list[list[float]]:
        """The probability that each text describes each picture: pictures × texts."""
        return self._call("POST", "/v1/match", {"images": _encoded(images), "texts": _many(texts)})["matches"]

    def embed_images(self, images: Picture | Sequence[Picture]) -> list[list[list[float]]]:
        """Pictures × queries × width, of unit length."""
        return self._call("POST", "/v1/embed/image", {"images": _encoded(images)})["embeddings"]

    def embed_texts(self, texts: str | Sequence[str]) -> list[list[float]]:
        """Texts × width, of unit length."""
        return self._call("POST", "/v1/embed/text", {"texts": _many(texts)})["embeddings"]

    def search(
        self, text: str | None = None, image: Picture | None = None, k: int = 10, **options: Any
    ) -> list[dict[str, Any]]:
        """The best pictures of the service's index: `path`, `score`, `similarity`, `match`, `columns`."""
        images = [] if image is None else _encoded(image)
        return self._call("POST", "/v1/search", {"text": text, "images": images, "k": k, **options})["hits"]

    def attention(self, image: Picture, text: str | None = None, speaker: bool = False) -> list[list[list[float]]]:
        """Where each query looks: queries × rows × columns over the picture's centre square."""
        asked = {"images": _encoded(image), "text": text, "speaker": speaker}
        return self._call("POST", "/v1/attention", asked)["maps"]

    def _call(self, method: str, path: str, asked: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json=asked)
        except httpx.HTTPError as error:
            raise QFormersError(f"{self._http.base_url}: no answer ({error or type(error).__name__})") from error
        try:
            content = answer.json()
        except ValueError as error:
            raise QFormersError(f"{self._http.base_url}: {answer.status_code}, and no JSON: is it qformers?") from error
        if answer.status_code != 200:
            told = content.get("error", {}) if isinstance(content, dict) else {}
            raise ServiceRefused(
                answer.status_code, told.get("code", "unknown"), told.get("message", answer.text[:200])
            )
        return content


def _encoded(images: Picture | Sequence[Picture]) -> list[str]:
    given = [images] if isinstance(images, str | Path | bytes) else images
    contents = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in given]
    return [base64.b64encode(content).decode() for content in contents]


def _many(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
