"""Train, evaluate and serve Q-Formers (BLIP-2). `qformers.load(path)` opens a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformers.version import __version__

if TYPE_CHECKING:
    from qformers.predictor import Predictor as Predictor
    from qformers.predictor import load as load
    from qformers.search.index import Index as Index

__all__ = ["Index", "Predictor", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: they wait until a model is asked for.
    if name in ("Predictor", "load"):
        from qformers import predictor

        return getattr(predictor, name)
    if name == "Index":
        from qformers.search.index import Index

        return Index
    raise AttributeError(f"module 'qformers' has no attribute {name!r}")
