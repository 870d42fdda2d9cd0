"""The application: routes, page, health and metrics, behind the guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from qformers import __version__
from qformers.errors import QFormersError
from qformers.serving import schema
from qformers.serving.chat import build_chat
from qformers.serving.errors import ServiceError, as_service_error
from qformers.serving.guard import Guard
from qformers.serving.page import mount_page
from qformers.serving.routes import ERRORS, build_routes
from qformers.serving.service import Service


def build_app(service: Service) -> Guard:
    """The ASGI application of a service."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(service.batcher.work())
        yield
        worker.cancel()
        service.close()

    app = FastAPI(title="qformers", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (ServiceError, QFormersError, ValidationError, Exception):
        app.add_exception_handler(kind, _refused)
    guard = Guard(app, service.config, service.metrics)
    only_drain = {503: ERRORS[503]}

    @app.get("/healthz", responses={405: ERRORS[405]})
    async def healthz() -> schema.State:
        """Whether the process answers."""
        return schema.State(status="ok")

    @app.get("/readyz", responses={405: ERRORS[405], **only_drain})
    async def readyz() -> schema.State:
        """Whether requests are taken: not while shutting down."""
        if guard.draining:
            raise ServiceError("draining", "shutting down")
        return schema.State(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **ERRORS})
    async def metrics() -> Response:
        """Counters in Prometheus's format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(build_routes(service))
    app.include_router(build_chat(service))

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    async def nothing(rest: str) -> None:
        """What is no address of ours is not the page's to answer."""
        raise ServiceError("not_found", "no such address here")

    mount_page(app, service)
    return guard


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """What went wrong in our form; a mistake of ours is raised again behind this, and the guard logs it."""
    return as_service_error(error).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals in our form."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        refused = ServiceError("method_not_allowed", f"not {request.method}").response()
        refused.headers.update(error.headers or {})
        return refused
    if error.status_code == 404:
        return ServiceError("not_found", "no such address here").response()
    return as_service_error(error).response()
