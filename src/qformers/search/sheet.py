"""Search results as one HTML page, pictures inside, that needs nothing else."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from pathlib import Path

from qformers.data.images import load_image
from qformers.errors import ConfigError, DataError
from qformers.search.index import Hit, Index

THUMBNAIL_PX = 320
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem; padding: 0 }
li { list-style: none; overflow-wrap: anywhere }
img { width: 100%; height: 12rem; object-fit: contain; background: #f3f3f3 }
small { color: #666 }
"""


def write_sheet(file: str | Path, index: Index, hits: list[Hit], question: str) -> None:
    """A contact sheet of `hits`, each with its scores, path and caption, under `question`.

    Raises:
        ConfigError: the file is there already. DataError: it cannot be written.
    """
    file = Path(file)
    items = "\n".join(_item(index, place, hit) for place, hit in enumerate(hits, start=1))
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{escape(question)}</title>'
        f"<style>{STYLE}</style>\n<h1>{escape(question)}</h1>\n"
        f"<p><small>{len(hits)} of {len(index)} pictures, {escape(index.settings.model)}</small></p>\n"
        f"<ol>\n{items}\n</ol>\n</html>\n"
    )
    try:
        with file.open("x", encoding="utf-8") as page_file:
            page_file.write(page)
    except FileExistsError as error:
        raise ConfigError(f"{file} is there already: give another file, or remove it") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error})") from error


def _item(index: Index, place: int, hit: Hit) -> str:
    caption = hit.columns.get("caption")
    match = "" if hit.match is None else f", match {hit.match:.3f}"
    return (
        f"<li>{_thumbnail(index.picture(hit.path), hit.path)}<br>{place}. <b>{hit.score:.3f}</b> "
        f"<small>similarity {hit.similarity:.3f}{match}</small><br><small>{escape(hit.path)}</small>"
        f"{f'<br>{escape(caption)}' if caption else ''}</li>"
    )


def _thumbnail(picture: Path, name: str) -> str:
    try:
        image = load_image(picture, name)
    except DataError as error:
        return f"<p>{escape(str(error))}</p>"  # gone since it was indexed: the hit is still one
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    content = BytesIO()
    image.save(content, "JPEG", quality=85)
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'
