"""What is answered when a request cannot be: one JSON form, `{"error": {"code": …, "message": …}}`.

A code never changes its meaning; a message may be worded anew.
"""

from __future__ import annotations

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from qformers.errors import CheckpointError, ConfigError, QFormersError

# status → codes; the OpenAPI document and docs/serving.md list them
CODES: dict[int, dict[str, str]] = {
    400: {"bad_request": "not HTTP that can be read"},
    401: {"unauthorised": "no token, or another one"},
    403: {"foreign_host": "asked under another name than this machine's own, without a token"},
    404: {
        "not_found": "no such address",
        "not_served": "no model here does that, or there is no index",
        "model_not_found": "no such model here",
    },
    405: {"method_not_allowed": "the address takes another method"},
    408: {"too_slow": "the request did not arrive in time"},
    409: {"index_changed": "a picture of the index cannot be read any more"},
    413: {
        "body_too_large": "the request has too many bytes",
        "image_too_large": "a picture has too many pixels",
    },
    415: {
        "unsupported_body": "neither JSON nor a multipart form",
        "unsupported_image": "not PNG, JPEG, WebP, GIF, BMP or TIFF",
    },
    422: {
        "invalid_request": "a field is missing, unknown or out of range",
        "bad_base64": "a picture is not base64",
        "remote_image": "a picture is an address; nothing is fetched",
        "broken_image": "a picture cannot be decoded",
        "bad_input": "the model cannot read this text",
        "bad_settings": "settings of the generation contradict each other, or ask for too much",
    },
    431: {"headers_too_large": "the header fields are too long"},
    500: {"internal": "a mistake of ours; the log has it"},
    503: {"busy": "too many requests; Retry-After says when to come again", "draining": "shutting down"},
    504: {"timed_out": "not answered within the time limit"},
}
STATUS_OF = {code: status for status, codes in CODES.items() for code in codes}
RETRY_SECONDS = 1


class ServiceError(Exception):
    """A request that is answered with one of CODES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = STATUS_OF[code]

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.status == 503:
            headers["Retry-After"] = str(RETRY_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.code in ("draining", "too_slow", "body_too_large"):
            headers["Connection"] = "close"
        body = {"error": {"code": self.code, "message": self.message}}
        return JSONResponse(body, self.status, headers)


def as_service_error(error: Exception) -> ServiceError:
    """What a client is told of `error`; nothing of one that is not its own."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, CheckpointError):
        return ServiceError("not_served", "the model served here has no part that does this")
    if isinstance(error, ConfigError):
        return ServiceError("bad_settings", str(error))
    if isinstance(error, QFormersError):
        return ServiceError("bad_input", str(error))
    return ServiceError("internal", "the service failed to answer this request; its log says why")


def _invalid(error: ValidationError) -> ServiceError:
    """The first thing wrong with a request, with the place and without what was sent; what has a code goes first."""
    errors = error.errors(include_url=False, include_input=False)
    first = next((each for each in errors if each["type"] in STATUS_OF), errors[0])
    place = ".".join(str(part) for part in first["loc"])
    code = first["type"] if first["type"] in STATUS_OF else "invalid_request"
    return ServiceError(code, f"{place}: {first['msg']}" if place else first["msg"])
