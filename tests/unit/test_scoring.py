"""ITM scores of many pairs, against one pair at a time; and kept on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import PATCHES, VISION_DIM, random_texts, tiny_stage1

from qformers.errors import DataError
from qformers.evaluation import scoring
from qformers.evaluation.score_file import HEADER_BYTES, ScoreFile, score_key
from qformers.evaluation.scoring import match_logits, match_parts

MODEL = tiny_stage1().eval()
PICTURES = torch.randn(7, PATCHES, VISION_DIM, generator=torch.Generator().manual_seed(1))
TEXTS = random_texts([3, 9, 5, 4, 9, 7, 12, 3, 6])


def alone(image: int, text: int) -> list[float]:
    """One pair by itself, nothing shared and nothing padded."""
    length = int(TEXTS[1][text].sum())
    with torch.inference_mode():
        memory = MODEL.remember(PICTURES[image : image + 1])
        return MODEL.match_logits([memory], *(part[text : text + 1, :length] for part in TEXTS))[0].tolist()


@pytest.mark.parametrize("images_at_once", [1, 3, 100])
@pytest.mark.parametrize("pairs_at_once", [1, 4, 100])
def test_pairs_in_batches_over_images_score_as_each_alone(images_at_once, pairs_at_once, monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_AT_ONCE", images_at_once)
    monkeypatch.setattr(scoring, "PAIRS_AT_ONCE", pairs_at_once)
    generator = np.random.default_rng(0)
    images, texts = np.nonzero(generator.random((7, 9)) < 0.5)
    asked = []

    def patches_of(rows):
        asked.append(rows)
        return PICTURES[rows]

    found = match_logits(MODEL, patches_of, TEXTS, (images, texts))
    expected = torch.tensor([alone(image, text) for image, text in zip(images, texts, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert max(map(len, asked)) <= images_at_once
    assert [row for rows in asked for row in rows] == sorted(set(images.tolist()))  # each image once


def test_pairs_in_any_order_and_none_at_all():
    images, texts = np.array([3, 0, 3, 1]), np.array([2, 2, 0, 8])
    found = match_logits(MODEL, lambda rows: PICTURES[rows], TEXTS, (images, texts))
    expected = torch.tensor([alone(image, text) for image, text in zip(images, texts, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert match_logits(MODEL, lambda rows: PICTURES[rows], TEXTS, (images[:0], texts[:0])).shape == (0, 2)


def test_a_score_file_goes_on_where_it_was_cut(tmp_path):
    images, texts = (part.ravel() for part in np.indices((7, 9)))
    whole = match_logits(MODEL, lambda rows: PICTURES[rows], TEXTS, (images, texts)).numpy()
    key = score_key("model", ["a"], "pictures", (images, texts))
    path = tmp_path / "new" / "scores"
    ScoreFile(path, key, len(images)).append(iter([whole[:10], whole[10:20]]), 0)
    path.write_bytes(path.read_bytes()[:-5])  # killed while it wrote the twentieth row
    file = ScoreFile(path, key, len(images))
    assert file.done == 19
    rest = (images[19:], texts[19:])
    parts = match_parts(MODEL, lambda rows: PICTURES[rows], TEXTS, rest)
    file.append((logits.numpy() for _, logits in parts), file.done)
    np.testing.assert_allclose(file.read(), whole, atol=1e-5)
    assert path.stat().st_size == HEADER_BYTES + 8 * len(images)
    path.write_bytes(path.read_bytes()[:7])  # killed while it was begun
    assert ScoreFile(path, key, len(images)).done == 0
    with pytest.raises(DataError, match="something else"):
        ScoreFile(path, key, len(images) + 1)
    with pytest.raises(DataError, match="something else"):
        ScoreFile(path, score_key("other model", ["a"], "pictures", (images, texts)), len(images))
    with pytest.raises(DataError, match="cannot be used"):
        ScoreFile(tmp_path, key, 1)
