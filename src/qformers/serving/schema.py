"""What requests and answers are made of: the source of the OpenAPI document."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from qformers.models.config import GenerationSettings
from qformers.serving.pictures import from_text

MAX_IMAGES = 16
MAX_TEXTS = 64
MAX_TEXT_CHARACTERS = 2000
MAX_NEW_TOKENS = 256
GENERATION = {field.name for field in fields(GenerationSettings)} | {"seed"}

# A word at least: what is only space says nothing.
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARACTERS, pattern=r"\S")]
Picture = Annotated[
    bytes,
    BeforeValidator(from_text),
    WithJsonSchema(
        {
            "type": "string",
            "format": "picture",
            "description": "PNG, JPEG, WebP, GIF, BMP or TIFF in base64, or as a data URI.",
        }
    ),
]
Pictures = Annotated[list[Picture], Field(min_length=1, max_length=MAX_IMAGES)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Request(BaseModel):
    """Unknown fields are refused, and so are NaN and infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Generating(Request):
    """How text is generated: `GenerationSettings`, and a seed for sampling. What is left out has its default there."""

    max_new_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_NEW_TOKENS)
    num_beams: int | None = Field(None, ge=1, le=10)
    top_p: float | None = Field(None, ge=0.01, le=1)
    temperature: float | None = Field(None, ge=0.05, le=10)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=0, lt=2**32)

    def generation(self) -> dict[str, Any]:
        """What was given of it."""
        names = GENERATION & type(self).model_fields.keys()
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class CaptionRequest(Generating):
    """Pictures to caption."""

    images: Pictures
    prompt: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS)] | None = Field(
        None, description="Text to go on from; default: the one the model was trained with."
    )
    num_return_sequences: int | None = Field(None, ge=1, le=10)


class AskRequest(Generating):
    """Pictures and what is asked of them."""

    images: Pictures
    questions: Texts = Field(description="As many as pictures; or one for all, or many about one picture.")


class MatchRequest(Request):
    """Every text is judged against every picture."""

    images: Pictures
    texts: Texts


class ImagesRequest(Request):
    """Pictures alone."""

    images: Pictures


class TextsRequest(Request):
    """Texts alone."""

    texts: Texts


class SearchRequest(Request):
    """What to look for: a text, a picture or both."""

    text: Text | None = None
    images: Annotated[list[Picture], Field(max_length=1)] = []
    k: int = Field(10, ge=1, le=100)
    rerank: int = Field(0, ge=0, le=256, description="Re-rank so many of the best with the ITM head; 0: none.")
    rule: Literal["itm", "itm+itc", "itm+itc/temperature"] = "itm+itc"
    thumbnails: bool = Field(False, description="Send a small JPEG of each hit too, in base64.")


class AttentionRequest(Request):
    """A picture, and what to look for in it."""

    images: Annotated[list[Picture], Field(min_length=1, max_length=1)]
    text: Text | None = Field(None, description="What the queries read at the same time, as in matching.")
    speaker: bool = Field(False, description="Of the model that speaks instead of the one that compares.")


class CaptionAnswer(BaseModel):
    """Captions."""

    model: str
    captions: list[list[str]] = Field(description="One list for each picture.")


class AskAnswer(BaseModel):
    """One answer for each question."""

    model: str
    answers: list[str]


class MatchAnswer(BaseModel):
    """Probabilities."""

    model: str
    matches: list[list[float]] = Field(description="The probability for each picture and text: pictures × texts.")


class ImagesAnswer(BaseModel):
    """Vectors of pictures."""

    model: str
    embeddings: list[list[list[float]]] = Field(description="Pictures × queries × width, of unit length.")


class TextsAnswer(BaseModel):
    """Vectors of texts."""

    model: str
    embeddings: list[list[float]] = Field(description="Texts × width, of unit length.")


class HitAnswer(BaseModel):
    """One picture found; `similarity` is ITC's, `match` ITM's where it was asked."""

    path: str = Field(description="From the indexed folder.")
    score: float
    similarity: float
    match: float | None
    columns: dict[str, Any]
    thumbnail: str | None = Field(description="JPEG in base64, where it was asked for and the file is still there.")


class SearchAnswer(BaseModel):
    """Pictures found, best first."""

    model: str
    hits: list[HitAnswer]


class AttentionAnswer(BaseModel):
    """Maps of attention."""

    model: str
    maps: list[list[list[float]]] = Field(
        description="Queries × rows × columns over the picture's centre square; each sums to 1 at most."
    )


class ModelCard(BaseModel):
    """A served model, in OpenAI's form, and what it does."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    does: list[str]


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]
    index_size: int | None = Field(description="Pictures in the index.")


class State(BaseModel):
    """How the service is."""

    status: str


class ErrorBody(BaseModel):
    """A code that stays, and words that may change."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """Every answer that is not 200."""

    error: ErrorBody
