"""Every odd kind of picture works, every damaged one is named, and the transforms are torchvision's."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qformers.data.config import TransformConfig
from qformers.data.images import load_image
from qformers.data.transforms import evaluation_transform, train_transform, transform_for
from qformers.errors import ConfigError, DataError

RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_cmyk_jpeg_keeps_its_colour():
    image = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert image.mode == "RGB" and np.abs(np.array(image)[4, 4].astype(int) - RED).max() < 8


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I")])
def test_16_bit_grey_is_scaled_not_clipped(kind, mode):
    ramp = np.linspace(0, 65535, 256).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]).reshape(16, 16)
    image = load_image(encoded(Image.frombytes(mode, (16, 16), ramp.tobytes()), kind))
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image)[..., 0].ravel(), np.arange(256))


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    assert load_image(encoded(palette, "PNG")).getpixel((0, 0)) == (0, 0, 255)
    image = load_image(encoded(palette, "PNG", transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 1)) == RED


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (90, 255), (90, 90, 90)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_alpha_lies_over_white(mode, colour, expected):
    assert load_image(encoded(Image.new(mode, (4, 4), colour), "PNG")).getpixel((2, 2)) == expected


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right-hand side
    image = Image.new("RGB", (20, 10), "blue")
    image.paste(RED, (0, 0, 20, 5))
    turned = load_image(encoded(image, "PNG", exif=exif))
    assert turned.size == (10, 20) and turned.getpixel((9, 10)) == RED and turned.getpixel((0, 10)) == (0, 0, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert image.getpixel((4, 4)) == RED


def test_paths_and_open_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise(5, 4), "PNG"))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert np.array_equal(np.array(load_image(source)), np.array(noise(5, 4)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"<html>not a picture</html>", "not a picture in any format"),
        (encoded(noise(64, 64), "JPEG")[:-600], "truncated"),
        (encoded(noise(64, 64), "PNG")[:-600], "truncated|broken"),
        (encoded(noise(64, 64), "WEBP")[:300], "."),
        (encoded(noise(64, 64), "GIF")[:-900], "."),
        (encoded(noise(64, 64), "TIFF")[:-900], "."),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating point, of unknown range"),
        (None, "no such file or directory"),
    ],
)
def test_a_damaged_picture_is_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        load_image(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    if content:
        with pytest.raises(DataError, match=f"^shard/3: .*({reason})"):
            load_image(content, name="shard/3")


def test_a_folder_and_a_decompression_bomb(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a directory"):
        load_image(tmp_path)
    bomb = encoded(Image.new("1", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(DataError, match=r"^bomb: .*exceeds limit of 8000 pixels"):
        load_image(bomb, name="bomb")


PLAIN = TransformConfig(image_px=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@given(st.integers(1, 90), st.integers(1, 90))
def test_evaluation_is_resize_then_centre_crop(width, height):
    image, short = noise(width, height), min(width, height)
    resized = image.resize((int(32 * width / short), int(32 * height / short)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    expected = np.array(resized.crop((left, top, left + 32, top + 32)))
    got = evaluation_transform(image, PLAIN)
    assert got.dtype == torch.float32
    if max(width, height) <= 64 * short:
        np.testing.assert_allclose(got.numpy().transpose(1, 2, 0) * 255, expected, atol=1e-3)
    assert got.shape == (3, 32, 32)


def test_an_endless_strip_costs_no_memory():
    strip = Image.linear_gradient("L").resize((1, 300_000)).convert("RGB")
    middle = evaluation_transform(strip, TransformConfig(224, PLAIN.mean, PLAIN.std))
    assert middle.shape == (3, 224, 224) and abs(middle.mean() - 0.5) < 0.01


@dataclass
class ClipInput:
    """CLIP's published normalisation, as an image encoder would say it."""

    image_px: int = 4
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


def test_normalisation_is_the_encoders():
    grey = Image.new("RGB", (10, 10), (128, 128, 128))
    pixels = evaluation_transform(grey, transform_for(ClipInput(), TransformConfig(flip=False)))
    expected = (128 / 255 - np.array(ClipInput.mean)) / ClipInput.std
    np.testing.assert_allclose(pixels[:, 2, 2].numpy(), expected, rtol=1e-6)


def test_another_normalisation_than_the_encoders_is_refused():
    transform_for(ClipInput(), TransformConfig(mean=(0.4815, 0.4578, 0.4082)))
    with pytest.raises(ConfigError, match=r"transform.std is \[0.5, 0.5, 0.5\], but .* trained with \[0.2686"):
        transform_for(ClipInput(), TransformConfig(std=(0.5, 0.5, 0.5)))


def torchvision_params(width, height, scale, generator):
    """RandomResizedCrop.get_params as torchvision documents it, with the same draws in the same order."""
    for _ in range(10):
        target_area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            i, j = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
            return i, j, h, w
    in_ratio = width / height
    if in_ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif in_ratio > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(60, 40), (33, 90), (200, 3), (1, 50), (1, 1), (40, 53)])
def test_training_crop_is_torchvisions(size):
    image, config = (
        noise(*size),
        TransformConfig(32, PLAIN.mean, PLAIN.std, crop_scale=(0.5, 1.0), flip=False),
    )
    for seed in range(8):
        i, j, h, w = torchvision_params(*size, config.crop_scale, np.random.default_rng(seed))
        expected = image.crop((j, i, j + w, i + h)).resize((32, 32), Image.Resampling.BICUBIC)
        got = train_transform(image, config, np.random.default_rng(seed)).numpy().transpose(1, 2, 0) * 255
        np.testing.assert_allclose(got, np.array(expected), atol=1e-3)


def test_half_of_the_training_pictures_are_mirrored():
    config = TransformConfig(8, PLAIN.mean, PLAIN.std, crop_scale=(1.0, 1.0))
    image = noise(8, 8)
    straight = evaluation_transform(image, config)
    seen = [train_transform(image, config, np.random.default_rng(seed)) for seed in range(200)]
    mirrored = sum(torch.equal(picture, straight.flip(2)) for picture in seen)
    plain = sum(torch.equal(picture, straight) for picture in seen)
    assert mirrored + plain > 0 and 0.3 < mirrored / (mirrored + plain) < 0.7


def test_config_is_hashable_and_checked():
    assert hash(TransformConfig()) == hash(TransformConfig()) and TransformConfig() != TransformConfig(image_px=364)
    with pytest.raises(ConfigError, match=r"crop_scale is \(0.9, 0.5\)"):
        TransformConfig(crop_scale=(0.9, 0.5))
