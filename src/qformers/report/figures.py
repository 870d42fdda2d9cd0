"""What every report draws with: figures as SVG in a light and a dark version, pictures inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a figure. `methods` are told apart by lightness too, not by hue alone."""

    text: str
    grid: str
    methods: tuple[str, ...]


THEMES = {
    "light": Theme("#495057", "#dee2e6", ("#1c57b5", "#8fb5ee", "#e8890c", "#adb5bd", "#7a4fb5", "#2f9e8f")),
    "dark": Theme("#c1c7cd", "#343a40", ("#6ea8fe", "#2f5fa8", "#f0a84a", "#6c757d", "#b08ae8", "#4dc4b3")),
}


def themed(draw, *args: object) -> dict[str, str]:
    """`draw(*args, theme)` once for each theme, as data URIs of SVG."""
    return {name: _svg_uri(draw(*args, theme)) for name, theme in THEMES.items()}


def picture_uri(picture: Image.Image, longest_px: int = 200) -> str:
    """The picture as a data URI of WebP, scaled so that its longer side is at most `longest_px`."""
    smaller = picture.convert("RGB")
    smaller.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def new_figure(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of `width` × `height` inches in the colours of `theme`, with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=8.5, length=0)
    return figure, axes


def _svg_uri(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt and no date: the same results give the same file.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "qformers"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    content = buffer.getvalue()
    svg = content[content.index("<svg") :]  # without the XML prologue, whose DTD is an address on the network
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
