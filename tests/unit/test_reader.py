"""`standardise_patches`: what the Q-Former reads at first has no part that is common to all patches."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import VISION_DIM, tiny_stage1
from torch import Tensor
from toy_run import toy_config, write_toy_data

from qformers.models.config import ModelConfig
from qformers.objectives.stage1 import query_diversity
from qformers.training.loop import train
from qformers.training.setup import build_run, find_checkpoint


def lopsided_patches(images: int) -> Tensor:
    """Patches as an image encoder gives them: a few dimensions are large in all of them."""
    patches = torch.randn(images, 9, VISION_DIM, generator=torch.Generator().manual_seed(1))
    patches[..., :3] += 30.0
    return patches


def read_by(norm: torch.nn.LayerNorm, patches: Tensor) -> Tensor:
    return F.layer_norm(patches, norm.normalized_shape, norm.weight, norm.bias, norm.eps).flatten(0, 1)


def test_every_dimension_is_read_with_mean_0_and_spread_1() -> None:
    model, patches = tiny_stage1(), lopsided_patches(40)
    model.standardise_patches(patches)
    read = read_by(model.vision_norm, patches)
    assert read.mean(dim=0).abs().max() < 1e-4
    # The large dimensions hardly differ between patches after the LayerNorm and are still brought to spread 1.
    assert (read.std(dim=0) - 1).abs().max() < 1e-3


def test_a_dimension_that_never_changes_is_not_blown_up() -> None:
    model, patches = tiny_stage1(), torch.ones(4, 9, VISION_DIM)
    patches[..., 0] = 2.0
    model.standardise_patches(patches)
    assert model.vision_norm.weight.max() <= 100.0
    assert torch.isfinite(model.vision_norm.bias).all()


def test_with_and_without_gradients_the_same_is_remembered() -> None:
    """Folded into the weights or not, `vision_norm` is the same map: 1e-9 relative in float64, for its rounding."""
    model, patches = tiny_stage1().double(), lopsided_patches(4).double()
    model.standardise_patches(patches)
    folded = model.remember(patches)
    with torch.no_grad():
        plain = model.remember(patches)
    for one, other in ((folded.keys, plain.keys), (folded.values, plain.values)):
        for with_gradients, without in zip(one, other, strict=True):
            assert with_gradients.requires_grad and not without.requires_grad
            torch.testing.assert_close(without, with_gradients.detach(), rtol=1e-9, atol=1e-9)


def test_queries_read_different_things_of_lopsided_patches_only_when_standardised() -> None:
    patches = lopsided_patches(16)
    diversity = []
    for standardised in (False, True):
        model = tiny_stage1()
        torch.nn.init.ones_(model.vision_norm.weight)
        torch.nn.init.zeros_(model.vision_norm.bias)
        if standardised:
            model.standardise_patches(patches)
        memory = model.remember(patches)
        # What cross-attention would add to a query: the same large value for each, or its own.
        diversity.append(query_diversity(memory.values[0].transpose(1, 2).flatten(2)).item())
    assert diversity[0] < 0.5 < 0.9 < diversity[1]


def test_a_run_starts_from_its_own_pictures_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    write_toy_data(tmp_path)
    plain = toy_config(tmp_path, tmp_path / "run")
    config = toy_config(
        tmp_path, tmp_path / "run", model=ModelConfig(**{**vars(plain.model), "standardise_patches": True})
    )
    accelerator = Accelerator(cpu=True)
    run = build_run(config, None, accelerator)
    pictures = torch.stack([run.train_data.images()[row].pixel_values for row in range(len(run.train_data))])
    with torch.no_grad():
        read = read_by(run.model.vision_norm, run.model.vision_encoder(pictures).float())
    assert read.mean(dim=0).abs().max() < 1e-3
    train(config)
    checkpoint = find_checkpoint(tmp_path / "run", "auto")
    resumed = build_run(config, checkpoint, accelerator)
    assert not torch.equal(resumed.model.vision_norm.bias, run.model.vision_norm.bias), "training moved it"
