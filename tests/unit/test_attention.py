"""`attend` takes two ways to one result: PyTorch's kernel and, in half precision on a CPU, plain products."""

import pytest
import torch

from qformers.models.attention import attend
from qformers.models.masks import causal_mask

HALF_STEP = 2.0**-8  # bf16 keeps 8 bits: rounding moves a value by at most this share of it


@pytest.mark.parametrize("masked", [True, False])
def test_plain_products_agree_with_the_kernel(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reads, length = 6, 6 if masked else 20
    mask = causal_mask(0, torch.ones(3, length, dtype=torch.bool)) if masked else None
    inputs = [torch.randn(3, 2, size, 16, generator=generator) for size in (reads, length, length)]
    upstream = torch.randn(3, 2, reads, 16, generator=generator)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value = (part.bfloat16().to(dtype).requires_grad_() for part in inputs)
        output = attend(query, key, value, mask, dropout=0.0)
        output.backward(upstream.to(dtype))
        results.append([output, query.grad, key.grad, value.grad])
    for half, full in zip(*results, strict=True):
        assert half.dtype == torch.bfloat16
        # A handful of roundings one after another, each of at most half a step of the largest entry.
        assert (half.float() - full).abs().max() < 4 * HALF_STEP * full.abs().max()


def test_dropout_on_the_plain_way_drops_what_it_says() -> None:
    query = torch.zeros(8, 4, 64, 8, dtype=torch.bfloat16).requires_grad_()
    ones = torch.ones(8, 4, 64, 8, dtype=torch.bfloat16)
    torch.manual_seed(0)
    dropped = attend(query, query.detach(), ones, None, dropout=0.5)
    # Sixty-four equal weights, half of them dropped and the rest doubled: one on average, and not everywhere.
    assert abs(dropped.float().mean().item() - 1) < 0.02
    assert dropped.float().std() > 0.05
