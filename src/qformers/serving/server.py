"""`serve`: load, listen, answer, and on SIGTERM finish what is running before the process ends."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from qformers.errors import ConfigError
from qformers.serving.app import build_app
from qformers.serving.config import ServeConfig
from qformers.serving.errors import ServiceError
from qformers.serving.guard import HEADER_BYTES, Guard
from qformers.serving.service import open_service

logger = logging.getLogger(__name__)

HEADER_SECONDS = 10
# Longer than clients keep theirs: an idle connection that is closed here may have a request on its way.
KEEP_ALIVE_SECONDS = 75


def serve(models: Sequence[str], index: str | None, config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CheckpointError, DataError, ConfigError: as `open_service`, or the address is taken.
    """
    # What is too large is refused by its own limit.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    listening = _listen(config)
    service = open_service(models, index, config)
    guard = build_app(service)
    access = logging.getLogger("qformers.serving.access")
    access.addHandler(logging.StreamHandler(sys.stderr))
    access.propagate = False
    options = uvicorn.Config(
        guard,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
        backlog=2 * config.max_requests,
    )
    host, port = listening.getsockname()[:2]
    logger.info("serving http://%s:%d", f"[{host}]" if ":" in host else host, port)
    # uvicorn raises the signal that ended it once more when all is done: then it must not kill.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _DrainingServer(options, guard, config.drain_seconds).run(sockets=[listening])


def _listen(config: ServeConfig) -> socket.socket:
    """A bound socket, before the model is loaded: a port that is taken is said at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host.strip("[]"), config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(f"{config.host}:{config.port}: cannot listen ({error.strerror}): choose another") from error
    return listening


class _DrainingServer(uvicorn.Server):
    """Between the signal and the end, what is running finishes; what comes meanwhile is answered with 503."""

    def __init__(self, config: uvicorn.Config, guard: Guard, drain_seconds: float) -> None:
        super().__init__(config)
        self.guard = guard
        self.drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.guard.draining = True
        logger.info("shutting down: %d requests to finish", self.guard.in_flight)
        try:
            await asyncio.wait_for(self.guard.idle.wait(), self.drain_seconds)
        except asyncio.TimeoutError:
            logger.error("%d requests did not finish within %s s", self.guard.in_flight, self.drain_seconds)
        await super().shutdown(sockets)


class PatientProtocol(H11Protocol):
    """uvicorn's, which waits only so long for the header of a request, and says what is wrong in our form."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ServiceError("bad_request", "this is not HTTP, or its header is too long"))

    def _watch(self) -> None:
        """Count the seconds while a header is coming, and only then."""
        coming = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not coming:
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(ServiceError("too_slow", f"no request within {HEADER_SECONDS} s"))

    def _refuse(self, error: ServiceError) -> None:
        body = json.dumps({"error": {"code": error.code, "message": error.message}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
