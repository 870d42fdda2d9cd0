"""The addresses under /v1 but for the chat: one request model, one call of the service, one answer each."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.formparsers import MultiPartException, MultiPartParser

from qformers.data.images import load_image
from qformers.errors import DataError
from qformers.search.index import Hit, plain_hit
from qformers.serving import schema
from qformers.serving.cache import CachingPredictor
from qformers.serving.errors import CODES, ServiceError
from qformers.serving.service import Service

THUMBNAIL_PX = 320
M = TypeVar("M", bound=schema.BaseModel)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": "; ".join(f"`{code}`: {why}" for code, why in codes.items())}
    for status, codes in CODES.items()
}


def name_of(model: CachingPredictor) -> str:
    """The id of a served model: the last part of where it came from."""
    folder = model.loaded.folder
    return folder.parent.name if folder.name == "model" else folder.name


def build_routes(service: Service) -> APIRouter:
    """The router of /v1."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)

    @routes.get("/models")
    async def models() -> schema.ModelList:
        """What is served here, and what each model does."""
        does = {
            "caption": service.speaker, "ask": service.speaker, "match": service.matcher, "embed": service.matcher,
            "search": service.matcher if service.index is not None else None,
        }  # fmt: skip
        cards = [
            schema.ModelCard(
                id=name_of(model), object="model", created=0, owned_by="qformers",
                does=[job for job, doer in does.items() if doer is model],
            )
            for model in (service.speaker, service.matcher)
            if model is not None
        ]  # fmt: skip
        size = None if service.index is None else len(service.index)
        return schema.ModelList(object="list", data=cards, index_size=size)

    @routes.post("/caption", openapi_extra=takes(schema.CaptionRequest))
    async def caption(request: Request) -> schema.CaptionAnswer:
        """Say what is in each picture."""
        asked = await read(request, schema.CaptionRequest)
        captions = await service.caption(asked.images, asked.prompt, asked.generation())
        return schema.CaptionAnswer(model=name_of(service.speaking()), captions=captions)

    @routes.post("/ask", openapi_extra=takes(schema.AskRequest))
    async def ask(request: Request) -> schema.AskAnswer:
        """Answer questions about pictures."""
        asked = await read(request, schema.AskRequest)
        answers = await service.ask(asked.images, asked.questions, asked.generation())
        return schema.AskAnswer(model=name_of(service.speaking()), answers=answers)

    @routes.post("/match", openapi_extra=takes(schema.MatchRequest))
    async def match(request: Request) -> schema.MatchAnswer:
        """The probability that each text describes each picture."""
        asked = await read(request, schema.MatchRequest)
        matches = await service.match(asked.images, asked.texts)
        return schema.MatchAnswer(model=name_of(service.comparing()), matches=matches)

    @routes.post("/embed/image", openapi_extra=takes(schema.ImagesRequest))
    async def embed_image(request: Request) -> schema.ImagesAnswer:
        """ITC features of pictures, one vector for each query."""
        asked = await read(request, schema.ImagesRequest)
        embeddings = await service.embed_images(asked.images)
        return schema.ImagesAnswer(model=name_of(service.comparing()), embeddings=embeddings)

    @routes.post("/embed/text", openapi_extra=takes(schema.TextsRequest, multipart=False))
    async def embed_text(request: Request) -> schema.TextsAnswer:
        """ITC features of texts. The similarity with a picture is the largest cosine over its vectors."""
        asked = await read(request, schema.TextsRequest)
        embeddings = await service.embed_texts(asked.texts)
        return schema.TextsAnswer(model=name_of(service.comparing()), embeddings=embeddings)

    @routes.post("/search", openapi_extra=takes(schema.SearchRequest))
    async def search(request: Request) -> schema.SearchAnswer:
        """Pictures of the index by text, by picture or by both."""
        asked = await read(request, schema.SearchRequest)
        options = {"k": asked.k, "rerank": asked.rerank, "rule": asked.rule}
        hits = await service.search(asked.text, asked.images, options)
        found = [await service.decode(hit_answer, service, hit, asked.thumbnails) for hit in hits]
        return schema.SearchAnswer(model=name_of(service.comparing()), hits=found)

    @routes.post("/attention", openapi_extra=takes(schema.AttentionRequest))
    async def attention(request: Request) -> schema.AttentionAnswer:
        """Where each query looks."""
        asked = await read(request, schema.AttentionRequest)
        maps = await service.attention(asked.images[0], asked.text, asked.speaker)
        model = service.speaking() if asked.speaker else service.comparing()
        return schema.AttentionAnswer(model=name_of(model), maps=maps)

    return routes


def hit_answer(service: Service, hit: Hit, thumbnails: bool) -> schema.HitAnswer:
    """A hit as it is sent, with a thumbnail if there is one to be had."""
    plain = plain_hit(hit)
    first = {name: plain.pop(name) for name in ("path", "score", "similarity", "match")}
    thumbnail = None
    if thumbnails:
        try:
            content = jpeg_thumbnail(service, hit.path)
            thumbnail = base64.b64encode(content).decode()
        except DataError:
            pass  # gone since it was indexed: the hit is still one
    return schema.HitAnswer(**first, columns=plain, thumbnail=thumbnail)


def jpeg_thumbnail(service: Service, path: str) -> bytes:
    """A small JPEG of a picture of the index. `path` is one that the index holds, never a client's."""
    picture = load_image(service.searching().picture(path))
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    content = BytesIO()
    picture.save(content, "JPEG", quality=85)
    return content.getvalue()


async def read(request: Request, model: type[M]) -> M:
    """The request's fields, from JSON or from a multipart form: files in `images`, lists by repeating a field.

    Raises:
        ServiceError, pydantic.ValidationError: what cannot be read, or does not fit.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return model.model_validate_json(await request.body())
    if kind != "multipart/form-data" or "images" not in model.model_fields:
        raise ServiceError("unsupported_body", "send JSON (Content-Type: application/json) or a multipart form")
    try:
        form = await _Uploads(request.headers, request.stream(), max_files=schema.MAX_IMAGES + 1).parse()
    except (MultiPartException, UnicodeDecodeError) as error:
        raise ServiceError("invalid_request", "the multipart form cannot be read") from error
    fields: dict[str, Any] = {}
    for name in form:
        values = [value if isinstance(value, str) else await value.read() for value in form.getlist(name)]
        listed = name in ("images", "texts", "questions")
        fields[name] = values if listed or len(values) > 1 else values[0]
    return model.model_validate(fields)


class _Uploads(MultiPartParser):
    """Uploads stay in memory, of which the guard has counted every byte."""

    spool_max_size = 0  # never on disk


def takes(model: type[schema.BaseModel], multipart: bool = True) -> dict[str, Any]:
    """What the OpenAPI document says of a body that `read` reads."""
    content: dict[str, Any] = {"application/json": {"schema": inline_schema(model)}}
    if multipart:
        form = inline_schema(model)
        form["properties"]["images"] |= {"items": {"type": "string", "format": "binary"}}
        content["multipart/form-data"] = {"schema": form, "encoding": {"images": {"contentType": "image/*"}}}
    return {"requestBody": {"required": True, "content": content}}


def inline_schema(model: type[schema.BaseModel]) -> dict[str, Any]:
    """The model's JSON schema with every reference replaced by what it refers to."""
    whole = model.model_json_schema()
    definitions = whole.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolve(definitions[part["$ref"].rpartition("/")[2]])
            return {key: resolve(value) for key, value in part.items()}
        return [resolve(value) for value in part] if isinstance(part, list) else part

    return resolve(whole)
