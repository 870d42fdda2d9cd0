"""What a language model must be to be shown pictures, and what stays as it is while it is."""

from __future__ import annotations

import pytest
import torch
from toy_language import END, PAD, toy_language_model, toy_prompts, toy_stage2, toy_transformers_model
from transformers import BertConfig, PretrainedConfig, PreTrainedModel

from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import GenerationSettings, LanguageConfig
from qformers.models.freezing import frozen_parts
from qformers.models.language import LanguageModel, build_language_model


class WordsOnly(PreTrainedModel):
    """A model that takes ids and nothing else."""

    config_class = PretrainedConfig

    def forward(self, input_ids):
        return input_ids


def test_a_model_that_takes_no_embeddings_is_refused():
    with pytest.raises(ConfigError, match="WordsOnly takes no inputs_embeds, so it cannot be shown visual prompts"):
        LanguageModel(WordsOnly(PretrainedConfig()), END, PAD)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "t5"])
def test_gradients_flow_through_it_and_not_into_it(family):
    model = toy_stage2(family).train()
    assert not any(module.training for module in model.language_model.modules())
    assert set(frozen_parts(model)) == {"language_model", "text_branch", "vision_encoder"}
    ids, mask = toy_prompts([[4, 5, END], [6, 7, END]])
    prompts = model.visual_prompts(torch.randn(2, 5, 24))
    model.language_model(prompts, ids, mask, ids, mask).logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        trained = not name.startswith("language_model") and "text_" not in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma3", "bart"])
def test_fresh_visual_prompts_are_as_large_as_words(family):
    """Whatever the family's scale of embeddings; the query outputs come from a LayerNorm."""
    from helpers import GivenPatches

    from qformers.models.config import ModelConfig
    from qformers.models.presets import build_stage2

    torch.manual_seed(0)
    config = ModelConfig(preset="tiny", start_from_text_encoder=False, num_queries=8)
    model = build_stage2(config, 50, GivenPatches(24), toy_language_model(family)).eval()
    prompts = model.visual_prompts(torch.randn(16, 5, 24))
    assert prompts.pow(2).mean().sqrt().item() == pytest.approx(model.language_model.embedding_rms(), rel=0.3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9 and max_new_tokens 8"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_return_sequences": 3, "num_beams": 2}, "only as many captions as beams"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_settings_are_refused_with_their_numbers(settings, said):
    with pytest.raises(ConfigError, match=said):
        GenerationSettings(**settings)


def test_generation_obeys_its_limits():
    model = toy_language_model("gpt2")
    visual = torch.randn(2, 4, model.dim)
    ids, mask = toy_prompts([[4], [5, 6]])
    said = model.generate(visual, ids, mask, GenerationSettings(min_new_tokens=7, max_new_tokens=9))
    assert 7 <= said.shape[1] <= 9 and not (said[:, :7] == END).any()
    plain = model.generate(visual, ids, mask, GenerationSettings(max_new_tokens=12, min_new_tokens=12))
    varied = model.generate(
        visual, ids, mask, GenerationSettings(max_new_tokens=12, min_new_tokens=12, repetition_penalty=50.0)
    )
    assert all(len(set(row)) == 12 for row in varied.tolist()) and len(set(plain[0].tolist())) < 12
    drawn = model.generate(visual, ids, mask, GenerationSettings(top_p=0.9, num_return_sequences=4, max_new_tokens=5))
    assert drawn.shape[0] == 8


@pytest.mark.parametrize("family", ["opt", "gemma3"])
@pytest.mark.parametrize("way", ["beams", "samples", "drawn samples"])
def test_a_picture_is_read_once_for_all_its_beams_and_samples(family, way):
    model, rows, each, new_tokens = toy_stage2(family).eval().language_model, 2, 4, 3
    places = []
    model.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: places.append(ids[0].numel()))
    model.model.register_forward_pre_hook(
        lambda _, given, named: (
            places.append(named["inputs_embeds"].shape[:2].numel()) if named.get("inputs_embeds") is not None else None
        ),
        with_kwargs=True,
    )
    if way == "beams":
        settings = GenerationSettings(max_new_tokens=new_tokens, min_new_tokens=new_tokens, num_beams=each)
    else:
        settings = GenerationSettings(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, top_p=0.9, num_return_sequences=each
        )
    draws = torch.rand(rows, each, new_tokens) if way == "drawn samples" else None
    ids, mask = toy_prompts([[4, 5, 6], [7]])
    prompts = torch.randn(rows, 8, model.dim)
    answers = model.generate(prompts, ids, mask, settings, draws=draws)
    assert answers.shape == (rows * (1 if way == "beams" else each), new_tokens)
    read = rows * (8 + 3)
    # The words of the prompt are looked up, everything but its last place is read, and then one token of each answer.
    assert sum(places) <= ids.numel() + (read - rows) + rows * each * new_tokens


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_vocabulary_head_gets_its_places_in_one_piece(family):
    model = toy_language_model(family)
    pieces: list[bool] = []
    # A hook added later is called later: it sees what the head gets.
    model.model.get_output_embeddings().register_forward_pre_hook(
        lambda head, arguments: pieces.append(arguments[0].is_contiguous())
    )
    ids, mask = toy_prompts([[4, 5, 6], [7], [8, 9]])
    model.generate(torch.randn(3, 4, model.dim), ids, mask, GenerationSettings(max_new_tokens=3))
    assert pieces and all(pieces)


def test_a_model_that_fills_gaps_is_no_decoder(tmp_path):
    BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="bert fills gaps and does not go on from a text"):
        build_language_model(LanguageConfig(path=str(tmp_path)), END, PAD)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    model = toy_language_model("llama").model
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"3 of the weights are missing, first model.layers.1.mlp"):
        build_language_model(LanguageConfig(path=str(tmp_path)), END, PAD)


def test_float16_weights_become_bfloat16_where_no_gpu_can_run_them(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    toy_language_model("gpt2").model.half().save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="qformers"):
        model = build_language_model(LanguageConfig(path=str(tmp_path)), END, PAD)
    if not torch.cuda.is_available():
        assert model.dtype == torch.bfloat16 and "stored in float16" in caplog.text


def test_a_checkpoint_s_own_generation_habits_do_not_apply():
    theirs = toy_transformers_model("bart")
    theirs.generation_config.no_repeat_ngram_size = 1
    model = LanguageModel(theirs, END, PAD)
    ids, mask = toy_prompts([[4, 5, END]])
    said = model.generate(
        torch.randn(1, 4, model.dim), ids, mask, GenerationSettings(max_new_tokens=25, min_new_tokens=25)
    )
    assert len(set(said[0].tolist())) < 25


def test_where_no_model_is_one_line_says_so(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        build_language_model(LanguageConfig(path=str(tmp_path / "none")), END, PAD)
    with pytest.raises(ConfigError, match="no language model can be loaded from here"):
        build_language_model(LanguageConfig(path=str(tmp_path)), END, PAD)
    toy_language_model("gpt2").model.save_pretrained(tmp_path / "gpt2")
    weights = tmp_path / "gpt2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        build_language_model(LanguageConfig(path=str(tmp_path / "gpt2")), END, PAD)
