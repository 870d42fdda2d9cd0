"""Patch embeddings of the pictures asked about last, by the hash of their content: a second question is cheap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cachetools import LRUCache
from jaxtyping import Float
from torch import Tensor

from qformers.models.saving import LoadedModel
from qformers.predictor import Picture, Predictor, PreparedImage


class CachingPredictor(Predictor):
    """A Predictor whose image encoder runs once for a prepared picture, while there is room to keep what it gave.

    `hits` and `misses` count pictures. Used by one thread at a time.
    """

    def __init__(self, loaded: LoadedModel, kept_bytes: int) -> None:
        super().__init__(loaded)
        self.hits = self.misses = 0
        self._kept: LRUCache[str, Tensor] = LRUCache(kept_bytes, getsizeof=lambda patches: patches.nbytes)

    @torch.inference_mode()
    def patches(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "images patches vision_dim"]:
        """As Predictor's."""
        given = images if isinstance(images, list) else [images]
        pictures = [image for image in given if isinstance(image, PreparedImage)]
        if len(pictures) < len(given):
            return super().patches(images)  # files of the index have no key
        found = {picture.key: self._kept[picture.key] for picture in pictures if picture.key in self._kept}
        new = {picture.key: picture for picture in pictures if picture.key not in found}
        if new:
            encoded = super().patches(list(new.values()))
            for key, patches in zip(new, encoded, strict=True):
                found[key] = patches.clone()  # a view would keep the whole batch
                if patches.nbytes <= self._kept.maxsize:
                    self._kept[key] = found[key]
        self.hits += len(pictures) - len(new)
        self.misses += len(new)
        return torch.stack([found[picture.key] for picture in pictures])
