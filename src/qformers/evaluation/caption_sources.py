"""What caption files hold beside captions: the domain of each NoCaps picture."""

from __future__ import annotations

import json
from pathlib import Path

from qformers.errors import DataError


def read_domains(path: str | Path) -> dict[str, str]:
    """The domain of each image id of NoCaps' annotation file: in-domain, near-domain or out-domain.

    Its captions are read as COCO captions, `SourceConfig(path, format="coco")`, and keep these ids as text.
    For `caption_metrics.by_domain`.

    Raises:
        DataError: no such file, not JSON, no images, an image without domain or id.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(f'{path}: no images: NoCaps\' annotations hold {{"images": [{{"id", "domain", …}}], …}}')
    domains = {}
    for number, image in enumerate(images):
        missing = [key for key in ("id", "domain") if not isinstance(image, dict) or image.get(key) in (None, "")]
        if missing:
            raise DataError(f"{path}: image {number} has no {missing[0]}: only NoCaps' own files tell the domains")
        domains[str(image["id"])] = str(image["domain"])
    return domains
