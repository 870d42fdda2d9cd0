"""Pictures of where the queries look."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from qformers.data.images import load_image

COLUMNS = 8
HEAT = (224, 49, 49)


def attention_overlay(picture: Image.Image, attention: Float[np.ndarray, "rows columns"]) -> Image.Image:
    """The picture in grey with red where a query looks, the strongest patch fully red; patches keep their edges."""
    strength = attention.astype(np.float64)
    strength = strength / max(float(strength.max()), 1e-12)
    mask = Image.fromarray((strength * 215).round().astype(np.uint8))
    grey = picture.convert("L").convert("RGB")
    faded = Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.25)
    return Image.composite(Image.new("RGB", grey.size, HEAT), faded, mask.resize(grey.size, Image.Resampling.NEAREST))


def draw_attention(image: str, maps: Float[Tensor, "layers queries rows columns"], output: Path) -> None:
    """Write a PNG: the picture, and one panel per query with `attention_overlay` of the last block."""
    picture = load_image(image)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    seen = picture.crop((left, top, left + side, top + side))  # the centre crop that the encoder gets
    weights = maps[-1].float().cpu().numpy()
    panels = len(weights) + 1
    rows = math.ceil(panels / COLUMNS)
    figure = Figure(figsize=(1.6 * min(panels, COLUMNS), 1.75 * rows), layout="constrained")
    for number, axes in enumerate(figure.subplots(rows, min(panels, COLUMNS), squeeze=False).flat):
        axes.axis("off")
        if number >= panels:
            continue
        axes.imshow(seen if number == 0 else attention_overlay(seen, weights[number - 1]))
        axes.set_title("picture" if number == 0 else f"query {number - 1}", fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
