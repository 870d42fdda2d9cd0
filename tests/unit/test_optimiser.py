"""The rate against hand-worked values and transformers' schedule; who decays; fused against the loop."""

from __future__ import annotations

import pytest
import torch
from helpers import VISION_DIM, tiny_stage1
from transformers import Dinov2Config, Dinov2Model, get_cosine_schedule_with_warmup

from qformers.errors import ConfigError
from qformers.models.bert import started_from_bert
from qformers.training.config import OptimiserConfig
from qformers.training.optimiser import build_optimiser, decay_groups, learning_rate, set_learning_rate

HAND_WORKED = OptimiserConfig(lr=1.0, min_lr=0.2, warmup_steps=10)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.1), (5, 0.5), (10, 1.0), (60, 0.6), (35, 0.2 + 0.8 * (1 + 0.5**0.5) / 2), (110, 0.2)],
)
def test_rate_equals_hand_worked_values(step, expected):
    assert learning_rate(step, HAND_WORKED, total_steps=110) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 7])
def test_rate_without_floor_is_transformers_schedule(warmup):
    config = OptimiserConfig(lr=3e-4, min_lr=0.0, warmup_steps=warmup)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = get_cosine_schedule_with_warmup(optimiser, warmup, 50)
    for step in range(51):
        assert learning_rate(step, config, 50) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimiser.step()
        schedule.step()


def test_only_weight_matrices_decay():
    model = tiny_stage1()
    decayed, spared = decay_groups(model)
    linears = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decayed.keys() == linears
    assert decayed.keys() | spared.keys() == trained
    assert not decayed.keys() & spared.keys()
    assert {"temperature", "qformer.query_tokens", "qformer.text_embeddings.word.weight"} <= spared.keys()


def test_frozen_parameters_are_left_out():
    model = tiny_stage1()
    model.itm_head.requires_grad_(False)
    decayed, spared = decay_groups(model)
    assert not [name for name in decayed | spared if name.startswith("itm_head")]


def test_decay_shrinks_a_matrix_and_not_the_queries():
    model = tiny_stage1()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = build_optimiser(model, OptimiserConfig(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimiser, 0.1)
    optimiser.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["itm_head.weight"], before["itm_head.weight"] * 0.95)
    assert torch.equal(after["qformer.query_tokens"], before["qformer.query_tokens"])
    assert torch.equal(after["temperature"], before["temperature"])


def test_weights_of_the_bert_of_texts_and_of_both_learn_at_their_shares_of_the_rate():
    """Which weights texts alone pass through, and which both, is told by where gradients arrive, not by names."""
    model = tiny_stage1()
    shares = OptimiserConfig(lr=1.0, min_lr=0.0, pretrained_lr_scale=0.5, text_lr_scale=0.1, shared_lr_scale=0.2)
    optimiser = build_optimiser(model, shares)
    set_learning_rate(optimiser, 0.5)
    rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    names = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(names)

    def reached(outputs: torch.Tensor) -> set[str]:
        model.zero_grad()
        outputs.square().sum().backward()
        weights = model.qformer.named_parameters(prefix="qformer")
        return {name for name, weight in weights if weight.grad is not None and weight.grad.any()}

    of_queries = reached(model.encode_image(torch.randn(2, 5, VISION_DIM)).query_outputs)
    tokens = torch.randint(1, 40, (2, 6))
    qformer = {name for name in names if name.startswith("qformer.")}
    assert {name for name, rate in names.items() if rate == 0.025} == qformer - of_queries
    both = of_queries & reached(model.encode_text(tokens, tokens > 0))
    assert both and {name for name, rate in names.items() if rate == 0.05} == both
    assert {name for name, rate in names.items() if rate == 0.5} == {n for n in names if not started_from_bert(n)}
    assert set(names.values()) == {0.5, 0.25, 0.05, 0.025}


def test_a_trained_image_encoder_s_layers_learn_at_falling_rates():
    """BEiT's layer-wise decay: the last layer at the whole rate, the embeddings before the first at the lowest."""
    shape = Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, mlp_ratio=2)
    model = torch.nn.ModuleDict({"vision_encoder": Dinov2Model(shape), "itm_head": torch.nn.Linear(2, 2)})
    optimiser = build_optimiser(model, OptimiserConfig(vision_layer_decay=0.5))
    scale = {id(parameter): group["lr_scale"] for group in optimiser.param_groups for parameter in group["params"]}
    scales = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert scales["itm_head.weight"] == 1.0
    assert scales["vision_encoder.embeddings.cls_token"] == 0.125
    layers = [name for name in scales if ".layer." in name]
    assert layers and all(scales[name] == 0.5 ** (2 - int(name.split(".layer.")[1][0])) for name in layers)


def test_fused_step_equals_the_loop():
    """Tolerance: fp32 rounding of the update, whose operations are ordered differently."""
    model, reference = tiny_stage1(), tiny_stage1()
    config = OptimiserConfig(lr=1e-3)
    ours = build_optimiser(model, config)
    assert ours.defaults["fused"]
    loop = torch.optim.AdamW(
        [
            {"params": list(group.values()), "weight_decay": decay}
            for group, decay in zip(decay_groups(reference), (config.weight_decay, 0.0), strict=True)
        ],
        lr=config.lr,
        betas=config.betas,
        foreach=False,
    )
    for step in range(3):
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        ours.step()
        loop.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 1e-4, "min_lr": 2e-4}, "min_lr 0.0002 and lr 0.0001"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1: must be at least 0"),
    ],
)
def test_impossible_settings_are_refused_with_their_numbers(settings, said):
    with pytest.raises(ConfigError, match=said):
        OptimiserConfig(**settings)
