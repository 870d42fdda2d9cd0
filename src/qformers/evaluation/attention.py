"""A picture of where the queries look."""

from __future__ import annotations

import math
from pathlib import Path

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from qformers.data.images import load_image

COLUMNS = 8


def draw_attention(image: str, maps: Float[Tensor, "layers queries rows columns"], output: Path) -> None:
    """Write a PNG: the picture, and one panel per query with the last block's attention laid over it."""
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
        axes.imshow(seen, extent=(0, 1, 0, 1))
        axes.set_title("picture" if number == 0 else f"query {number - 1}", fontsize=8)
        if number > 0:
            axes.imshow(weights[number - 1], extent=(0, 1, 0, 1), alpha=0.6, cmap="magma", interpolation="bilinear")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
