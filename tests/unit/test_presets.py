"""Fresh weights of a preset."""

from __future__ import annotations

import torch
from helpers import VISION_DIM, VOCAB_SIZE

from qformers.models.config import ModelConfig
from qformers.models.masks import unimodal_mask
from qformers.models.presets import PRESETS, build_qformer, preset_of, shape_of


def test_query_tokens_start_at_the_size_of_their_preset():
    config = ModelConfig(num_queries=32)
    for name in ("small", "tiny"):
        torch.manual_seed(0)
        qformer = build_qformer(config, PRESETS[name], VISION_DIM, VOCAB_SIZE)
        spread = qformer.query_tokens.std().item() / PRESETS[name].query_std
        assert 0.9 < spread < 1.1
        assert preset_of(shape_of(qformer)) == name  # though what fresh weights were drawn from cannot be seen


@torch.no_grad()
def test_the_size_of_the_query_tokens_changes_no_output():
    torch.manual_seed(0)
    qformer = build_qformer(ModelConfig(num_queries=4), PRESETS["tiny"], VISION_DIM, VOCAB_SIZE).double().eval()
    texts = torch.ones(2, 3, dtype=torch.bool)

    def outputs() -> torch.Tensor:
        words = qformer.text_embeddings(torch.ones(2, 3, dtype=torch.long))
        return qformer(qformer.queries(2), words, unimodal_mask(4, texts), [memory])[0]

    memory = qformer.remember(torch.randn(2, 5, VISION_DIM, dtype=torch.float64))
    small = outputs()
    qformer.query_tokens.mul_(50)
    torch.testing.assert_close(outputs(), small, rtol=0, atol=1e-7)  # the LayerNorm's eps of 1e-12 beside 0.02²
