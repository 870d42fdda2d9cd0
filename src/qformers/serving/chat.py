"""`/v1/chat/completions` as OpenAI's clients speak it: a picture as a data URI, whole answers and streamed ones."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qformers.models.config import GenerationSettings
from qformers.serving import schema
from qformers.serving.errors import ServiceError, as_service_error
from qformers.serving.routes import ERRORS, name_of, read, takes
from qformers.serving.service import Generation, Service

Words = Annotated[str, StringConstraints(max_length=schema.MAX_TEXT_CHARACTERS)]


class TextPart(BaseModel):
    """Words of a message."""

    type: Literal["text"]
    text: Words


class ImageUrl(BaseModel):
    """A picture, in the only way that is taken."""

    url: schema.Picture
    detail: str | None = None


class ImagePart(BaseModel):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """What one side said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=64)]

    @property
    def text(self) -> str:
        """Its words."""
        parts = [self.content] if isinstance(self.content, str) else [
            part.text for part in self.content if isinstance(part, TextPart)
        ]  # fmt: skip
        return " ".join(" ".join(parts).split())

    @property
    def pictures(self) -> list[bytes]:
        """Its pictures."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class ChatRequest(BaseModel):
    """OpenAI's request. What would change the answer and is not done here must be left out; the rest is ignored."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = Field(max_length=200)
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    max_tokens: int | None = Field(None, ge=1, le=schema.MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=schema.MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, description="0 or left out: the likeliest words.")
    top_p: float | None = Field(None, ge=0.01, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stream: bool | None = False
    n: Literal[1] | None = None
    stop: None = None
    tools: None = None
    functions: None = None
    response_format: None = None
    logprobs: Literal[False] | None = None

    def generation(self) -> Generation:
        """`GenerationSettings`' fields, and the seed: no beams, as a stream has none."""
        chosen: Generation = {
            "num_beams": 1,
            "length_penalty": 1.0,
            "max_new_tokens": GenerationSettings.max_new_tokens,
        }
        if limit := self.max_completion_tokens or self.max_tokens:
            chosen["max_new_tokens"] = limit
        if self.temperature or (self.top_p is not None and self.temperature is None):
            chosen |= {"top_p": self.top_p or 1.0, "temperature": max(self.temperature or 1.0, 0.05)}
        if self.seed is not None:
            chosen["seed"] = self.seed
        return chosen

    def picture(self) -> bytes:
        """The one picture of the conversation."""
        pictures = [picture for message in self.messages for picture in message.pictures]
        if len(pictures) != 1:
            raise ServiceError("invalid_request", f"{len(pictures)} pictures: a conversation is about one")
        return pictures[0]

    def question(self) -> str | None:
        """What is asked, where it is the first question and nothing was said before it."""
        said = [message for message in self.messages if message.text]
        return said[0].text if len(said) == 1 and said[0].role == "user" else None

    def prompt(self, template: str) -> str | None:
        """The conversation as BLIP-2 is asked (section 4.1): what was asked and answered before, then the question.

        None where nothing is asked: a caption is wanted.
        """
        turns, before = [], []
        for message in self.messages:
            if message.role in ("system", "developer"):
                before.append(message.text)
            elif message.role == "assistant":
                turns.append(message.text)
            elif message.text:
                turns.append(template.replace("{}", message.text))
        return " ".join(filter(None, [*before, *turns])) or None


class ChatMessage(BaseModel):
    """The answer's words."""

    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop"]


class ChatAnswer(BaseModel):
    """OpenAI's answer, without a count of tokens."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]


def build_chat(service: Service) -> APIRouter:
    """The router of the chat."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)

    @routes.post(
        "/chat/completions",
        response_model=ChatAnswer,
        openapi_extra=takes(ChatRequest, multipart=False),
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def complete(request: Request) -> Any:
        """A caption of the picture in the conversation, or the answer to what is asked of it."""
        asked = await read(request, ChatRequest)
        name = name_of(service.speaking())
        if asked.model != name:
            raise ServiceError("model_not_found", f"the model that speaks here is {name!r}")
        picture, question, generation = asked.picture(), asked.question(), asked.generation()
        prompt = asked.prompt(service.speaking().loaded.stage2()[1].question_template)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if asked.stream:
            pieces = service.stream(picture, prompt, generation, question)
            try:
                first = await anext(pieces, "")  # a picture that cannot be read still has its own status
            except Exception as error:
                await pieces.aclose()
                raise as_service_error(error) from error
            return StreamingResponse(_events(head, first, pieces), media_type="text/event-stream")
        if question is None:
            [[said]] = await service.caption([picture], prompt, generation)
        else:
            [said] = await service.ask([picture], [question], generation)
        message = ChatMessage(role="assistant", content=said)
        return ChatAnswer(
            object="chat.completion", choices=[Choice(index=0, message=message, finish_reason="stop")], **head
        )

    return routes


async def _events(head: dict[str, Any], first: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Server-sent events, one for each piece."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": first.lstrip()})
    try:
        async for piece in pieces:
            if piece:
                yield event({"content": piece})
    except Exception as error:
        told = as_service_error(error)
        yield f"data: {json.dumps({'error': {'code': told.code, 'message': told.message}})}\n\n"
        return
    yield event({}, "stop")
    yield "data: [DONE]\n\n"
