"""A client's bytes → a picture: known raster formats only, its size known before a pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import hashlib
from io import BytesIO

from PIL import Image
from pydantic_core import PydanticCustomError

from qformers.data.images import load_image
from qformers.errors import DataError
from qformers.predictor import Predictor, PreparedImage
from qformers.serving.errors import ServiceError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def from_text(given: object) -> bytes:
    """The content of a base64 text or of a data URI; bytes, of an uploaded file, are as they are.

    Raises:
        PydanticCustomError: an address, or no base64.
    """
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str):
        raise PydanticCustomError("invalid_request", "a picture is a base64 text")
    scheme, colon, rest = given[:4096].partition(":")
    if colon:
        kind, comma, _ = rest.partition(",")
        if scheme.strip().lower() != "data":
            raise PydanticCustomError("remote_image", "pictures are not fetched: send their bytes, in base64")
        if not comma or not kind.lower().endswith(";base64"):
            raise PydanticCustomError("bad_base64", "a data URI of a picture begins like data:image/png;base64,")
        given = given[len(scheme) + len(kind) + 2 :]
    try:
        return base64.b64decode("".join(given.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PydanticCustomError("bad_base64", "not base64") from error


def prepare(model: Predictor, content: bytes, name: str, max_pixels: int) -> PreparedImage:
    """The picture as `model` wants it, named by the hash of its bytes.

    Raises:
        ServiceError: not one of FORMATS, more than `max_pixels`, or damaged.
    """
    try:
        picture = Image.open(BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ServiceError("image_too_large", f"{name}: more than {max_pixels} pixels: send a smaller one") from error
    except Exception as error:  # Pillow documents no narrower set
        kinds = "PNG, JPEG, WebP, GIF, BMP nor TIFF"
        raise ServiceError("unsupported_image", f"{name}: neither {kinds}: send one of those") from error
    if picture.width * picture.height > max_pixels:
        raise ServiceError(
            "image_too_large",
            f"{name}: {picture.width} × {picture.height} pixels, the limit is {max_pixels}: send a smaller one",
        )
    try:
        pixel_values = model.preprocess(load_image(picture, name))[0]
    except DataError as error:
        raise ServiceError("broken_image", str(error)) from error
    return PreparedImage(pixel_values, hashlib.sha256(content).hexdigest())
