"""What stands before every request: who may ask, how much, how long; and the log of what was answered.

The log has method, path, status, sizes and times, and nothing of what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable
from http.cookies import CookieError, SimpleCookie
from typing import TypeVar
from urllib.parse import parse_qs

from fastapi.responses import RedirectResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qformers.serving.config import ServeConfig, is_loopback
from qformers.serving.errors import ServiceError, as_service_error
from qformers.serving.metrics import Metrics

access = logging.getLogger("qformers.serving.access")
logger = logging.getLogger(__name__)

T = TypeVar("T")
COOKIE = "qformers_token"
LATE_SECONDS = 5
HEADER_BYTES = 32 * 1024
FOR_EVERYONE = ("/healthz", "/readyz")
# All that the page needs of Gradio's own server; the rest of it takes files and addresses from clients.
PAGE_PATHS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
PAGE_FILES = (
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/startup-events", "/gradio_api/info",
    "/openapi.json",
)  # fmt: skip
OWN_FILES = (*FOR_EVERYONE, "/metrics")


class Guard:
    """ASGI middleware around the whole application, page included."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics
        self.draining = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._token = (config.token or "").encode()
        self._waiting_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        start, answer = time.monotonic(), _Answer(send)
        counted = scope["path"].startswith("/v1/")
        try:
            if welcome := self._welcome(scope):
                await welcome(scope, receive, answer)
            elif counted:
                await self._count_and_answer(scope, receive, answer, start)
            else:
                await self.app(scope, _no_body(receive), answer)
        except Exception as error:
            await self._apologise(error, scope, receive, answer)
        finally:
            self._log(scope, answer, time.monotonic() - start)

    def _welcome(self, scope: Scope) -> RedirectResponse | None:
        """Whether the request may come in; a first visit of the page with its token gets a cookie.

        Raises:
            ServiceError: it may not.
        """
        path, headers = scope["path"], Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in headers.raw) + len(scope["query_string"]) > HEADER_BYTES:
            raise ServiceError("headers_too_large", f"the limit is {HEADER_BYTES} bytes")
        if path in FOR_EVERYONE:
            return None
        if self._token:
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if path == "/" and asked and self._is_token(asked):
                cookie = RedirectResponse("/", 303)
                cookie.set_cookie(COOKIE, asked, httponly=True, samesite="strict")
                return cookie
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            sent = bearer.strip() if scheme.lower() == "bearer" else _cookie(headers)
            if not self._is_token(sent):
                raise ServiceError("unauthorised", "send the service's token: Authorization: Bearer TOKEN")
        elif not is_loopback(_host(headers)) or headers.get("sec-fetch-site") == "cross-site":
            # Another site's page in this machine's browser, possibly under a name that it made point here.
            raise ServiceError("foreign_host", "without a token this service answers to localhost alone")
        if path.startswith("/v1/") or path in OWN_FILES:
            return None
        if (
            ".." not in path
            and scope["method"] in ("GET", "HEAD")
            and (path in PAGE_FILES or path.startswith(PAGE_PATHS))
        ):
            return None
        raise ServiceError("not_found", "no such address here")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token)

    async def _count_and_answer(self, scope: Scope, receive: Receive, answer: _Answer, start: float) -> None:
        if self.draining:
            raise ServiceError("draining", "the service is shutting down: ask another, or again later")
        if self.in_flight >= self.config.max_requests:
            raise ServiceError("busy", f"{self.in_flight} requests are waiting or running: come again")
        self.in_flight += 1
        self.idle.clear()
        self.metrics.in_flight.set(self.in_flight)
        taken = [0]
        try:
            left = self.config.time_limit_seconds
            body = await _in_time(self._read(scope, receive, taken), left, "too_slow")
            left -= time.monotonic() - start
            await _in_time(self._answer(scope, receive, answer, body), left, "timed_out")
        finally:
            self._waiting_bytes -= taken[0]
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)
            if not self.in_flight:
                self.idle.set()

    async def _read(self, scope: Scope, receive: Receive, taken: list[int]) -> bytes:
        """The body, whole. Raises ServiceError where it is too long or too much waits already."""
        limit, announced = self.config.max_body_bytes, Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise ServiceError(
                "body_too_large", f"{announced} bytes, the limit is {limit}: send fewer or smaller pictures"
            )
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            chunk = message.get("body", b"")
            chunks.append(chunk)
            taken[0] += len(chunk)
            self._waiting_bytes += len(chunk)
            if taken[0] > limit:
                raise ServiceError("body_too_large", f"more than {limit} bytes: send fewer or smaller pictures")
            if self._waiting_bytes > self.config.max_waiting_bytes:
                raise ServiceError("busy", "too many bytes are waiting: come again")
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, body: bytes) -> None:
        """Run the application; give it up when the client does."""
        task = asyncio.ensure_future(self.app(scope, _replay(body, receive), answer))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Gone
            await task
        finally:
            for running in (task, gone):
                running.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _apologise(self, error: Exception, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if isinstance(error, _Gone):
            return
        told = as_service_error(error)
        if told.status == 500:
            logger.exception("%s %s (request %s)", scope["method"], scope["path"], answer.request_id)
        if answer.status is None:
            await told.response()(scope, receive, answer)
        if told.code == "body_too_large":
            # Closed at once, the connection would be reset before a client that still sends has read the answer.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_discard(receive, 4 * self.config.max_body_bytes), LATE_SECONDS)

    def _log(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        path = scope["path"] if answer.status not in (403, 404) else "(none)"
        status = answer.status or 499  # the client left before there was one
        self.metrics.requests.labels(path, status).inc()
        self.metrics.request_seconds.labels(path).observe(seconds)
        client = (scope.get("client") or ("", 0))[0]
        fields = {
            "request": answer.request_id, "client": client, "method": scope["method"], "path": scope["path"][:200],
            "status": status, "bytes": answer.sent_bytes, "seconds": round(seconds, 4),
        }  # fmt: skip
        access.info("%s", json.dumps(fields))


class _Gone(Exception):
    """The client has left."""


class _Answer:
    """Passes on what is sent, and remembers status and size. Every answer names its request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = uuid.uuid4().hex[:12]
        self.status: int | None = None
        self.sent_bytes = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [(b"x-request-id", self.request_id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        else:
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)


async def _in_time(work: Awaitable[T], seconds: float, code: str) -> T:
    try:
        return await asyncio.wait_for(work, max(seconds, 0.001))
    except asyncio.TimeoutError as error:
        raise ServiceError(code, "the time limit is over: send less, or come again when there is less to do") from error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _discard(receive: Receive, limit: int) -> None:
    while limit > 0:
        message = await receive()
        limit -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read already."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.Future()  # the guard itself listens for the client's leaving

    return replay


def _no_body(receive: Receive) -> Receive:
    """A `receive` for addresses that take no body: what is sent is not kept."""

    async def without() -> Message:
        message = await receive()
        return {**message, "body": b""} if message["type"] == "http.request" else message

    return without


def _host(headers: Headers) -> str:
    host = headers.get("host", "")
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
