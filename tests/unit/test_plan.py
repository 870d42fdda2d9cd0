"""The calculator of `qformers plan` against torch's own counters and against models that are built."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import GivenPatches
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model, OPTConfig, OPTForCausalLM

from qformers.cli import main
from qformers.data.batch import Batch
from qformers.data.config import SourceConfig, TransformConfig
from qformers.errors import ConfigError
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.language import build_language_model
from qformers.models.presets import PRESETS, build_stage1, build_stage2
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.lm import Stage2Objective
from qformers.objectives.stage1 import Stage1Objective
from qformers.training.config import DataConfig, TrainConfig
from qformers.training.plan import BERT_VOCABULARY, Layers, plan, qformer_parameters, stage1_flops, stage1_kept

ROWS, PATCHES, VISION_DIM, TOKENS, QUERIES = 4, 50, 384, 14, 8


@pytest.fixture(scope="module")
def measured():
    """Parameters, forward products and sums, and bytes kept, of a stage-1 step of the small preset in float32."""
    torch.manual_seed(0)
    config = ModelConfig(
        preset="small", num_queries=QUERIES, start_from_text_encoder=False, dropout=0.0, attention_dropout=0.0
    )
    model = build_stage1(config, BERT_VOCABULARY, GivenPatches(VISION_DIM))
    objective = Stage1Objective(model, Stage1LossConfig())
    batch = Batch(
        input_ids=torch.randint(1000, 30000, (ROWS, TOKENS)),
        attention_mask=torch.ones(ROWS, TOKENS, dtype=torch.bool),
        image_ids=torch.arange(ROWS),
        names=("",) * ROWS,
        patch_embeds=torch.randn(ROWS, PATCHES, VISION_DIM),
    )
    with FlopCounterMode(display=False) as counter, bytes_kept(model) as kept:
        losses = objective(batch).losses
    assert losses
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    return matrices, counter.get_total_flops(), sum(kept.values())


@contextmanager
def bytes_kept(model: torch.nn.Module):
    """What autograd saves meanwhile, by address; the model's own weights are left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_parameters_are_those_of_the_built_model(measured):
    counted = qformer_parameters(PRESETS["small"], VISION_DIM, QUERIES, 2, 256)
    assert counted == pytest.approx(measured[0], rel=0.01)


def test_products_are_those_that_torch_counts(measured):
    counted = ROWS * stage1_flops(PRESETS["small"], VISION_DIM, PATCHES, QUERIES, TOKENS, 2)
    print(f"flops: counted {counted:,}, torch {measured[1]:,}")
    assert counted == pytest.approx(measured[1], rel=0.1)


def test_memory_is_what_autograd_keeps(measured):
    counted = ROWS * 4 * stage1_kept(PRESETS["small"], VISION_DIM, PATCHES, QUERIES, TOKENS, 2)
    print(f"bytes kept: counted {counted:,}, torch {measured[2]:,}")
    assert counted == pytest.approx(measured[2], rel=0.25)


def test_a_step_of_stage_2_with_its_language_model(tmp_path):
    """Forward and backward, the frozen model's share above half."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    OPTForCausalLM(OPTConfig(**sizes, ffn_dim=512, vocab_size=2000)).save_pretrained(tmp_path / "opt")
    Dinov2Config(hidden_size=VISION_DIM).save_pretrained(tmp_path / "dinov2")
    language = LanguageConfig(path=str(tmp_path / "opt"), dtype="float32")
    speaker = build_language_model(language, end_id=2, pad_id=1)
    model_config = ModelConfig(
        vision_encoder=str(tmp_path / "dinov2"),
        preset="tiny",
        num_queries=QUERIES,
        start_from_text_encoder=False,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = build_stage2(model_config, BERT_VOCABULARY, GivenPatches(VISION_DIM), speaker).train()
    batch = Batch(
        input_ids=torch.randint(10, 1000, (ROWS, TOKENS)),
        attention_mask=torch.ones(ROWS, TOKENS, dtype=torch.bool),
        image_ids=torch.arange(ROWS),
        names=("",) * ROWS,
        patch_embeds=torch.randn(ROWS, PATCHES, VISION_DIM),
        labels=torch.randint(10, 1000, (ROWS, TOKENS)),
    )
    with FlopCounterMode(display=False) as counter:
        with bytes_kept(model) as kept:
            losses = Stage2Objective(model)(batch).losses
        sum(losses.values()).backward()
    config = TrainConfig(
        output="runs/x",
        stage=2,
        start="runs/stage1",
        precision="fp32",
        language=language,
        model=model_config,
        data=DataConfig(
            train=[SourceConfig("a.jsonl")],
            batch_size=ROWS,
            features="features",
            transform=TransformConfig(image_px=98),
        ),
    )
    counted = plan(config, 1)
    print(f"flops: counted {counted.step_flops:,}, torch {counter.get_total_flops():,}")
    print(f"bytes kept: counted {counted.activation_bytes:,}, torch {sum(kept.values()):,}")
    assert counted.step_flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert counted.activation_bytes == pytest.approx(sum(kept.values()), rel=0.25)


def test_an_image_encoders_products():
    encoder = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, 56, 56))
    assert Layers(3, 64, 256, patch_px=14).flops(17) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_more_processes_share_the_rows_and_the_command_prints_it(capsys, tmp_path):
    config = TrainConfig(output="runs/x", data=DataConfig(train=[SourceConfig("a.jsonl")], batch_size=64))
    one, eight = plan(config, 1), plan(config, 8)
    assert one.rows == 64 and eight.rows == 8 and one.state_bytes == eight.state_bytes
    assert one.step_flops == 8 * eight.step_flops and one.activation_bytes == 8 * eight.activation_bytes
    stored = replace(config, data=replace(config.data, features="features"))
    assert plan(stored, 1).step_flops < one.step_flops
    with pytest.raises(ConfigError, match=r"batch_size is 64 for 7 GPU\(s\): it must be a multiple"):
        plan(config, 7)
    assert main(["plan", "recipes/stage2_decoder.yaml", "--gpus", "16"]) == 0
    printed = capsys.readouterr().out
    assert "120 rows" in printed and "GB" in printed
