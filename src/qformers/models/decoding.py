"""Keys and values while text is generated: written in place, and of beams only what they said is moved."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


def roomy_cache(config: PretrainedConfig, room: int) -> DynamicCache | None:
    """An empty cache of a decoder with room for `room` tokens beside those that it reads at first.

    None where a layer is of another kind than the plain one (a sliding window, say).
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    layers: Any = cache.layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        return None
    layers[:] = [RoomyLayer(room) for _ in layers]
    return cache


def repeat_for_beams(cache: DynamicCache, rows_of_each: int, room: int) -> DynamicCache:
    """The cache with each row repeated for its beams or samples, and room for `room` more tokens.

    A cache with layers of another kind than the plain one is repeated as it does it itself.
    """
    layers: Any = cache.layers
    if all(type(layer) in (DynamicLayer, RoomyLayer) for layer in layers):
        layers[:] = [RoomyLayer(room).repeating(layer, rows_of_each) for layer in layers]
    else:
        cache.batch_repeat_interleave(rows_of_each)
    return cache


class RoomyLayer(DynamicLayer):
    """One layer's keys and values. transformers' own copies all of them at every token to grow, and again to reorder.

    Beams of one picture share what was read before they began, so reordering them moves only what came after.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.read = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for what is read first and `room` tokens more; called by the first `update`."""
        self._make_room(key_states, value_states, rows_of_each=1)
        self.keys, self.values = (whole[:, :, :0] for whole in self._whole)

    def repeating(self, other: DynamicLayer, rows_of_each: int) -> RoomyLayer:
        """Itself, with each row of `other` repeated."""
        assert other.keys is not None and other.values is not None, "nothing was read"
        self._make_room(other.keys, other.values, rows_of_each)
        for whole, part in zip(self._whole, (other.keys, other.values), strict=True):
            whole.unflatten(0, (len(part), rows_of_each))[:, :, :, : self.read] = part[:, None]
        self.keys, self.values = (whole[:, :, : self.read] for whole in self._whole)
        return self

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new tokens' keys and values behind the others; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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

    def _make_room(
        self,
        keys: Float[Tensor, "rows heads read d"],
        values: Float[Tensor, "rows heads read d"],
        rows_of_each: int,
    ) -> None:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.read = keys.shape[2]
        self._whole = [
            part.new_empty(part.shape[0] * rows_of_each, part.shape[1], self.read + self.room, part.shape[3])
            for part in (keys, values)
        ]
