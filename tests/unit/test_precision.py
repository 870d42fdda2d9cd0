"""Half precision where the machine has it: "auto" goes by what the processor says of itself."""

from __future__ import annotations

import pytest
import torch
from toy_language import toy_tokenizer, toy_transformers_model

from qformers.models.config import LanguageConfig
from qformers.models.language import build_language_model
from qformers.precision import autocast, multiplies_bf16, precision_dtype, without_emulation


@pytest.fixture(params=[True, False], ids=["has bf16", "has none"])
def has_bf16(request, monkeypatch) -> bool:
    """A CPU with or without bf16, whatever this one is."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": request.param}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return request.param


def test_auto_is_bf16_where_the_processor_multiplies_it(has_bf16):
    assert multiplies_bf16("cpu") == multiplies_bf16() == has_bf16
    assert precision_dtype("auto") == (torch.bfloat16 if has_bf16 else torch.float32)
    with autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == precision_dtype("auto")


@pytest.mark.parametrize("named, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_named_precision_is_taken_as_it_is(has_bf16, named, dtype):
    assert precision_dtype(named) == dtype


def test_a_torch_that_does_not_say_what_a_processor_has(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision_dtype("auto", "cpu") == torch.float32


def test_halves_are_read_as_float32_only_where_they_would_be_emulated(has_bf16):
    model = torch.nn.Linear(2, 2).bfloat16()
    model.register_buffer("kept", torch.arange(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    without_emulation(model)
    assert model.weight.dtype == (torch.bfloat16 if has_bf16 else torch.float32) and model.kept.dtype == torch.int64
    assert all(torch.equal(value.float(), before[name].float()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_language_model_stored_in_bf16(has_bf16, dtype, tmp_path):
    toy_transformers_model("gpt2").bfloat16().save_pretrained(tmp_path)
    toy_tokenizer(tmp_path)
    model = build_language_model(LanguageConfig(path=str(tmp_path), dtype=dtype), end_id=1, pad_id=0)
    assert model.dtype == (torch.bfloat16 if has_bf16 or dtype == "bfloat16" else torch.float32)
