"""The checker behind every annotation in the tests; as in PEP 484, an int may stand for a float."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
