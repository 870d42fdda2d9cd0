"""Pictures in the wild → RGB: every kind that has one meaning works, every damaged one is refused by name."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from qformers.errors import DataError

# What Pillow's decoders raise on damaged files; it documents no narrower set.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    OverflowError,
    LookupError,
    struct.error,
    Image.DecompressionBombError,
)


def load_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """One picture as RGB, 8 bits a channel, upright.

    CMYK, 16-bit, palette and alpha (laid over white) pictures are converted, EXIF rotation is applied and
    the first frame of an animation is taken. `name` stands for the picture in errors (default: its path).
    Raises DataError, with the name and the reason, if the file is missing, empty, damaged, no picture, or
    larger than Pillow's decompression-bomb limit.
    """
    image = decode_image(source, name)
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return _to_rgb(ImageOps.exif_transpose(image) if turned else image)  # it copies, turned or not
    except _DECODER_ERRORS as error:
        raise DataError(f"{_name_of(source, name)}: {_reason(error)}") from error


def decode_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """The picture as its file has it (mode, size and format), fully decoded. Raises as `load_image` does."""
    name = _name_of(source, name)
    if source == "":
        raise DataError(f"{name}: there is no picture")
    try:
        if isinstance(source, (str, Path)):
            # Read whole: given the path, Pillow leaves the file of a picture that it cannot decode open.
            source = Path(source).read_bytes()
        if source == b"":
            raise DataError(f"{name}: the file is empty (0 bytes)")
        image = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
        image.load()
    except _DECODER_ERRORS as error:
        raise DataError(f"{name}: {_reason(error)}") from error
    return image


def _name_of(source: object, name: str | None) -> str:
    if name is not None:
        return name
    return str(source) if isinstance(source, (str, Path)) else "picture"


def _reason(error: BaseException) -> str:
    """The decoder's own words in one line, without the file's name (the caller has put it first)."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in any format Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys at 255 when it converts them; mode "I" holds 16-bit values in practice.
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating point, of unknown range: save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
