"""One HTML file that needs nothing beside itself, laid out by a template on the page that all reports share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from qformers.report.figures import picture_uri


def write_page(
    folder: str | Path, package: str, filters: dict[str, Callable[..., str]] | None = None, **content: object
) -> Path:
    """Write `report.html` into `folder` and return its path; an older one is replaced at once.

    Args:
        package: whose `templates/report.html` fills the blocks `title`, `style` and `main` of `page.html`.
        filters: of the template, beside `duration` (seconds) and `picture` (`picture_uri`).
        content: the template's variables.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("qformers.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, picture=picture_uri, **(filters or {}))
    html = environment.get_template("report.html").render(**content)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "report.html.partial"
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, folder / "report.html")
    return folder / "report.html"


def duration(seconds: float) -> str:
    """As people say it: seconds below a minute, then minutes too."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest:02d} s"
