"""What stands in a Q-Former's place: against hand-worked means and torch's attention, trained, saved and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GivenPatches, random_batch, randomise
from safetensors.torch import load_file
from torch import nn
from toy_language import toy_language_model, toy_tokenizer, toy_transformers_model
from toy_run import metric_rows, toy_config, write_toy_data

import qformers
from qformers.cli import main
from qformers.convert.run import convert
from qformers.data.batch import IGNORED_LABEL
from qformers.errors import CheckpointError, ConfigError
from qformers.models.bridges import AveragePooling, PerceiverLayer, PerceiverResampler, PooledMLP
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.presets import build_bridged
from qformers.models.saving import load_model
from qformers.objectives.lm import Stage2Objective
from qformers.training.config import TrainConfig
from qformers.training.loop import train
from qformers.training.plan import plan

OTHERS = ("linear", "mlp", "perceiver")
GRID, VISION_DIM = 4, 24


def bridged(bridge: str, queries: int = 8):
    """A random model around 4 × 4 patches and [CLS]."""
    encoder = GivenPatches(VISION_DIM)
    encoder.prefix_tokens, encoder.grid = 1, GRID
    config = ModelConfig(
        bridge=bridge, preset="tiny", num_queries=queries, start_from_text_encoder=False, dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_bridged(config, encoder, toy_language_model("gpt2"))
    for part in (model.bridge, model.language_projection):
        randomise(part)
    return model


def some_patches(images: int) -> torch.Tensor:
    return torch.randn(images, 1 + GRID**2, VISION_DIM, generator=torch.Generator().manual_seed(images))


def test_pooling_is_the_mean_of_each_rectangle_without_cls():
    pooled = AveragePooling(8, VISION_DIM, prefix_tokens=1, grid=GRID)(some_patches(2))
    squares = some_patches(2)[:, 1:].reshape(2, GRID, GRID, VISION_DIM)
    by_hand = [squares[:, 2 * y : 2 * y + 2, x].mean(dim=1) for y in range(2) for x in range(4)]
    torch.testing.assert_close(pooled, torch.stack(by_hand, dim=1))


def test_mlp_is_two_linear_layers_with_gelu_between():
    model = bridged("mlp", queries=4)
    patches = some_patches(1)
    theirs = nn.Sequential(model.bridge.up, nn.GELU(), model.language_projection)
    pooled = AveragePooling(4, VISION_DIM, prefix_tokens=1, grid=GRID)(model.vision_norm(patches))
    assert model.bridge.up.out_features == model.language_model.dim
    torch.testing.assert_close(model.visual_prompts(patches), theirs(pooled))


def test_perceiver_layer_is_torchs_attention_over_patches_and_latents():
    torch.manual_seed(0)
    ours = PerceiverLayer(32, 4, 64, 0.0, 0.0)
    randomise(ours)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([ours.attention.query.weight, ours.attention.kv.weight]),
            "in_proj_bias": torch.cat([ours.attention.query.bias, ours.attention.kv.bias]),
            "out_proj.weight": ours.attention.out.weight,
            "out_proj.bias": ours.attention.out.bias,
        }
    )
    latents, patches = torch.randn(2, 5, 32), torch.randn(2, 17, 32)
    asking = ours.latents_norm(latents)
    read = torch.cat([ours.patches_norm(patches), asking], dim=1)
    attended = latents + theirs(asking, read, read)[0]
    expected = attended + ours.ffn.down(nn.functional.gelu(ours.ffn.up(ours.ffn_norm(attended))))
    torch.testing.assert_close(ours(latents, patches), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bridge", OTHERS)
@pytest.mark.parametrize("images", [1, 3])
def test_as_many_visual_tokens_whatever_the_batch(bridge, images):
    model = bridged(bridge)
    prompts = model.visual_prompts(some_patches(images))
    assert prompts.shape == (images, 8, model.language_model.dim)
    torch.testing.assert_close(model.visual_prompts(some_patches(images)[:1]), prompts[:1], atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match="reads no text"):
        model.visual_prompts(some_patches(1), (torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)))


@pytest.mark.parametrize("bridge", OTHERS)
def test_all_of_the_bridge_learns_and_nothing_of_the_language_model(bridge):
    model = bridged(bridge, queries=4)
    batch = random_batch([5, 7])
    batch = replace(
        batch,
        patch_embeds=some_patches(2),
        input_ids=batch.input_ids.clamp(max=20),
        labels=batch.input_ids.clamp(max=20).masked_fill(~batch.attention_mask, IGNORED_LABEL),
    )
    first = Stage2Objective(model)(batch).total
    first.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} <= {"vision_norm", "bridge", "language_projection"}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
    assert all(parameter.grad is None for parameter in model.language_model.parameters())
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(20):
        optimiser.step()
        optimiser.zero_grad()
        loss = Stage2Objective(model)(batch).total
        loss.backward()
    assert loss < first - 0.1


def test_rectangles_that_the_grid_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="1 × 7 rectangles, and the image encoder gives 4 × 4"):
        bridged("linear", queries=7)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bridges")
    write_toy_data(folder)
    toy_transformers_model("gpt2").save_pretrained(folder / "gpt2")
    toy_tokenizer(folder / "gpt2")
    return folder


def run_config(data: Path, bridge: str, output: Path, **settings) -> TrainConfig:
    config = toy_config(data, output, precision="fp32", steps=4, evaluate_every_steps=4)
    model = replace(config.model, bridge=bridge, standardise_patches=True, text_encoder="not/needed")
    return replace(config, **{"stage": 2, "model": model, "language": LanguageConfig(str(data / "gpt2")), **settings})


@pytest.fixture(scope="module", params=OTHERS)
def run(request, data) -> tuple[TrainConfig, Path]:
    config = run_config(data, request.param, data / request.param)
    return config, train(config).model


def test_it_trains_without_a_stage_1_and_captions(run, data, capsys):
    config, model = run
    assert [row["step"] for row in metric_rows(Path(config.output))] == [1, 2, 3, 4]
    before, after = (load_file(file) for file in (data / "gpt2/model.safetensors",
                                                  model / "language_model/model.safetensors"))  # fmt: skip
    assert all(torch.equal(before[name], after[name]) for name in before)
    spoken = qformers.load(model).caption(data / "0.png", max_new_tokens=5)
    assert main(["caption", str(data / "0.png"), "--model", config.output, "--max_new_tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["captions"] == spoken


def test_it_is_read_back_bit_for_bit_and_goes_on(run, data, tmp_path):
    config, model = run
    predictor = qformers.load(model)
    predictor.save_pretrained(tmp_path / "copy")
    convert(model, tmp_path / "converted", "qformers")
    first = load_file(model / "model.safetensors")
    assert any(name.startswith("bridge.") for name in first) == (config.model.bridge != "linear")
    for folder in (tmp_path / "copy", tmp_path / "converted"):
        again = load_model(folder).model.state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    further = replace(config, output=str(tmp_path / "on"), start=str(model), language=LanguageConfig(), steps=4)
    assert train(further).steps == 4


def test_what_only_a_qformer_does_is_refused(run, data, tmp_path):
    config, model = run
    bridge = config.model.bridge
    with pytest.raises(CheckpointError, match=f"its bridge is {bridge}"):
        qformers.load(model).attention(data / "0.png")
    with pytest.raises(ConfigError, match=f"its bridge is {bridge}"):
        convert(model, tmp_path / "hf", "hf")
    with pytest.raises(ConfigError, match=f"model.bridge is {bridge}"):
        plan(config, 1)
    with pytest.raises(CheckpointError, match="image encoder or bridge is not the recipe's"):
        other = replace(config.model, bridge="perceiver" if bridge != "perceiver" else "mlp")
        train(replace(config, output=str(tmp_path / "other"), model=other, start=str(model)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": 1, "language": LanguageConfig()}, "only a Q-Former has a stage 1"),
        ({"language": LanguageConfig()}, "language.path"),
        ({"language": LanguageConfig("lm", qformer_reads="question")}, "only a Q-Former reads text"),
        ({"task": "vqa", "language": LanguageConfig("lm")}, "questions are for a Q-Former"),
    ],
)
def test_settings_that_another_bridge_cannot_have(settings, said, data, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_config(data, "mlp", tmp_path, **settings)


def test_layers_of_a_perceiver_computed_twice_give_the_same(data, tmp_path):
    train(run_config(data, "perceiver", tmp_path / "once"))
    train(run_config(data, "perceiver", tmp_path / "twice", checkpoint_layers=True))
    first, second = (load_file(tmp_path / name / "model/model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_types_of_the_bridges():
    kinds = {"linear": AveragePooling, "mlp": PooledMLP, "perceiver": PerceiverResampler}
    assert all(isinstance(bridged(name).bridge, kind) for name, kind in kinds.items())
