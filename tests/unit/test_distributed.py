"""A step on several processes is the step on one with the same global batch: losses, gradients and weights."""

from __future__ import annotations

import pytest
import step_worker
import torch
from helpers import random_batch, tiny_stage1
from step_worker import CASES, SAME_AS, drawing, step
from torch.multiprocessing import start_processes

from qformers.distributed import GlobalMean, fetch_rows, gather_with_gradient, process_offset, rank, world_size
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.contrast import contrast
from qformers.objectives.output import row_slices
from qformers.objectives.stage1 import Stage1Objective

# 20 steps of AdamW carry rounding on: a key's bias has no effect, so its step is all rounding over Adam's epsilon.
TOLERANCES = {"given_negatives_fp32": 1e-6, "weights_after_steps": 1e-8}


def test_alone_everything_is_the_identity():
    features = torch.randn(3, 4)
    assert gather_with_gradient(features) is features
    assert (world_size(), rank(), process_offset(3)) == (1, 0, 0)
    assert torch.equal(fetch_rows(features, torch.tensor([2, 0, 2])), features[[2, 0, 2]])
    assert GlobalMean.over(torch.tensor(4)).share(torch.tensor(6.0)) == 1.5


@pytest.fixture(scope="module")
def alone():
    """Every case on one process with the whole batch."""
    return {name: case() for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[2, 4])
def together(request, forking, tmp_path_factory):
    """Every case on several processes: what data-parallel training makes of their results, their mean."""
    folder, processes = tmp_path_factory.mktemp("processes"), request.param
    start_processes(step_worker.run, args=(processes, folder), nprocs=processes, start_method="forkserver")
    shares = [torch.load(folder / f"{number}.pt") for number in range(processes)]
    return {
        case: {name: torch.stack([share[case][name] for share in shares]).mean(dim=0) for name in shares[0][case]}
        for case in CASES
    }


def assert_same(found, expected, tolerance):
    """Every entry to `tolerance`, of the largest entry of the tensor where that is above 1."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max()
        assert difference <= tolerance * tensor.abs().max().clamp_min(1), f"{name} differs by {difference}"


@pytest.mark.parametrize("case", CASES)
def test_several_processes_equal_one(alone, together, case):
    assert_same(together[case], alone[case], TOLERANCES.get(case, 1e-10))


@pytest.mark.parametrize("case", SAME_AS)
def test_micro_batches_equal_the_whole_batch_on_several_processes(alone, together, case):
    assert_same(together[case], alone[SAME_AS[case]], 1e-10)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["stage1", "trained_encoder", "stage2"])
def test_any_micro_batch_size_gives_the_gradients_of_the_whole_batch(kind, micro_batch_size):
    case = getattr(step_worker, kind)
    assert_same(case(micro_batch_size), case(None), 1e-10)


def test_both_passes_of_gradient_caching_draw_the_same_dropout():
    """Against a graph over all micro-batches at once, each with its own random numbers."""
    batch, slices = random_batch([4, 6, 3, 5, 7]), row_slices(5, 2)
    settings = {"dropout": 0.3, "attention_dropout": 0.2}
    objective = Stage1Objective(tiny_stage1(**settings).double(), Stage1LossConfig(itc_steps=1)).train()
    found = step(objective, [batch], 2)

    model = tiny_stage1(**settings).double().train()
    features = []
    for number, rows in enumerate(slices):
        piece = batch.rows(rows)
        with drawing(number):
            image = model.encode_image(piece.patch_embeds).image_features
            features.append((image, model.encode_text(piece.input_ids, piece.attention_mask)))
    images, texts = (torch.cat(side) for side in zip(*features, strict=True))
    loss = contrast(images, texts, model.temperature, batch.image_ids, Stage1LossConfig()).loss
    loss.backward()
    gradients = {
        f"model.{name}": weights.grad for name, weights in model.named_parameters() if weights.grad is not None
    }
    assert_same(found, {"itc": loss.detach(), **gradients}, 1e-10)
