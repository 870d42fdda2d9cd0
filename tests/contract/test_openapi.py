"""The service against its own OpenAPI document: schemathesis asks what the document allows, and what it does not."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from qformers.serving.app import build_app
from qformers.serving.config import ServeConfig
from qformers.serving.errors import CODES
from qformers.serving.service import open_service

OPERATIONS = [
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/v1/models")),
    *(
        ("POST", f"/v1/{name}")
        for name in ("caption", "ask", "match", "embed/image", "embed/text", "search", "attention")
    ),
    ("POST", "/v1/chat/completions"),
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    missing_required_header,
    unsupported_method,
]


@pytest.fixture(scope="module")
def document(service, toy_models):
    picture = toy_models.base64(0)
    # That a text is a picture is more than a schema can say: mostly it is one, so that what lies behind is reached.
    pictures = st.one_of(st.just(picture), st.just(f"data:image/png;base64,{picture}"), st.text(max_size=20))
    schemathesis.openapi.format("picture", pictures)
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_answer_breaks_the_contract(method, path, mode, document):
    statuses = []

    @given(case=document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        # A form has texts alone: what JSON calls a wrong type is there a text like any other.
        form = case.media_type == "multipart/form-data"
        answer = case.call_and_validate(
            checks=[check for check in CHECKS if not form or check != negative_data_rejection]
        )
        statuses.append(answer.status_code)

    try:
        ask()
    except Unsatisfiable:
        assert method == "GET"  # nothing can be wrong with a request that takes nothing
    else:
        # That a conversation is about one picture is more than the schema says: the chat's tests see to it.
        assert statuses and (mode.is_negative or path.startswith("/v1/chat") or 200 in statuses)


def test_the_operations_are_all_there_are(service):
    document = httpx.get(f"{service.url}/openapi.json", trust_env=False).json()
    operations = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert operations == set(OPERATIONS)


def test_the_document_names_every_code(service):
    document = json.dumps(httpx.get(f"{service.url}/openapi.json", trust_env=False).json())
    for codes in CODES.values():
        for code in codes:
            assert f"`{code}`" in document


def test_with_no_model_that_does_it_every_address_says_so(toy_models):
    """One model, no index: 404 with a code, from every address that needs what is not there."""
    picture = toy_models.base64(0)
    bodies = {
        "/v1/caption": {"images": [picture]},
        "/v1/ask": {"images": [picture], "questions": ["a"]},
        "/v1/search": {"text": "a"},
        "/v1/attention": {"images": [picture], "speaker": True},
    }

    async def ask() -> dict[str, httpx.Response]:
        # Built where a loop runs: where none does, Gradio opens some and closes none.
        app = build_app(open_service([str(toy_models.matcher)], None, ServeConfig()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return {path: await http.post(path, json=body) for path, body in bodies.items()}

    for path, answer in asyncio.run(ask()).items():
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_served"), path
