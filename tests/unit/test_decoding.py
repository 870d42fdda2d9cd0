"""Keys and values of beams, beside transformers' own cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig

from qformers.models.decoding import RoomyLayer, repeat_for_beams, roomy_cache


@pytest.mark.parametrize("rows", [1, 3])
def test_beams_read_what_transformers_cache_holds(rows: int) -> None:
    beams, new_tokens = 4, 5
    read = torch.randn(2, rows, 2, 6, 8)
    theirs, ours = DynamicCache(), DynamicCache()
    for cache in (theirs, ours):
        cache.update(read[0], read[1], 0)
    theirs.batch_repeat_interleave(beams)
    ours = repeat_for_beams(ours, beams, room=new_tokens)
    assert isinstance(ours.layers[0], RoomyLayer)
    for _ in range(new_tokens):
        new = torch.randn(2, rows * beams, 2, 1, 8)
        expected, found = (cache.update(new[0], new[1], 0) for cache in (theirs, ours))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        # A beam goes on from any beam of its own picture.
        chosen = torch.randint(beams, (rows, beams)) + beams * torch.arange(rows)[:, None]
        for cache in (theirs, ours):
            cache.reorder_cache(chosen.flatten())


def test_one_text_a_row_is_written_in_place() -> None:
    config = LlamaConfig(num_hidden_layers=1)
    ours, theirs = roomy_cache(config, room=3), DynamicCache(config=config)
    assert ours is not None
    places = set()
    for length in (6, 1, 1, 1):
        new = torch.randn(2, 2, 2, length, 8)
        expected, found = (cache.update(new[0], new[1], 0) for cache in (theirs, ours))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        places.add(found[0].data_ptr())
    assert len(places) == 1


def test_a_decoder_with_windows_keeps_its_own_cache() -> None:
    assert roomy_cache(Gemma3TextConfig(num_hidden_layers=6), room=3) is None
