"""ITC over two processes is ITC over one batch, gradients included (the authors' gather carries none)."""

from __future__ import annotations

import itc_worker
import torch
import torch.multiprocessing
from torch.nn.functional import normalize

from qformers.distributed import gather_with_gradient, process_offset, rank, world_size


def test_alone_everything_is_the_identity():
    features = torch.randn(3, 4)
    assert gather_with_gradient(features) is features
    assert (world_size(), rank(), process_offset(3)) == (1, 0, 0)


def test_two_processes_equal_one(tmp_path):
    torch.manual_seed(0)
    images = normalize(torch.randn(6, 3, 8, dtype=torch.float64), dim=-1)
    texts = normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1)
    image_ids = torch.tensor([0, 1, 2, 1, 3, 0])  # shared across the two halves
    torch.multiprocessing.spawn(itc_worker.run, args=(2, tmp_path, (images, texts, image_ids)), nprocs=2)
    halves = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    for case, use_image_ids in enumerate((True, False)):
        whole = itc_worker.itc_gradients(images, texts, image_ids, use_image_ids)
        first, second = halves[0][case], halves[1][case]
        # Data-parallel training averages the processes' gradients, so each carries twice its share.
        for name in ("loss", "temperature"):
            torch.testing.assert_close((first[name] + second[name]) / 2, whole[name], atol=1e-12, rtol=0)
        for name in ("images", "texts"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]) / 2, whole[name], atol=1e-12, rtol=0)
