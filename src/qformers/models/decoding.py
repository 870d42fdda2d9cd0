"""Keys and values while text is generated: written in place, and of beams only what they said is moved."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def repeat_for_beams(cache: DynamicCache, rows_of_each: int, room: int) -> DynamicCache:
    """The cache with each row repeated for its beams or samples, and room for `room` more tokens.

    A cache with layers of another kind than the plain one (a sliding window, say) is repeated as it does it itself.
    """
    layers: Any = cache.layers
    if all(type(layer) is DynamicLayer for layer in layers):
        layers[:] = [BeamLayer(layer.keys, layer.values, rows_of_each, room) for layer in layers]
    else:
        cache.batch_repeat_interleave(rows_of_each)
    return cache


class BeamLayer(DynamicLayer):
    """One layer's keys and values. transformers' own copies all of them twice at every token: growing, and reordering.

    Beams of one picture share what was read before they began, so reordering them moves only what came after.
    """

    def __init__(
        self,
        keys: Float[Tensor, "rows heads read d"],
        values: Float[Tensor, "rows heads read d"],
        rows_of_each: int,
        room: int,
    ) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.read = keys.shape[2]
        self._whole = [_with_room(part, rows_of_each, room) for part in (keys, values)]
        self.keys, self.values = (whole[:, :, : self.read] for whole in self._whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new tokens' keys and values behind the others; all of them."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:stop] = new
        self.keys, self.values = (whole[:, :, :stop] for whole in self._whole)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Row i goes on from where row `beam_idx[i]` was, a beam of the same picture."""
        said = slice(self.read, self.get_seq_length())
        for whole in self._whole:
            whole[:, :, said] = whole[:, :, said].index_select(0, beam_idx.to(whole.device))


def _with_room(
    part: Float[Tensor, "rows heads read d"], rows_of_each: int, room: int
) -> Float[Tensor, "repeated heads longer d"]:
    rows, heads, read, dim = part.shape
    whole = torch.empty(rows * rows_of_each, heads, read + room, dim, dtype=part.dtype, device=part.device)
    whole.unflatten(0, (rows, rows_of_each))[:, :, :, :read] = part[:, None]
    return whole
