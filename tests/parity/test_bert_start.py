"""Starting from a BERT: its text model is ours word for word, and a wrong checkpoint gets one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import PATCHES, VISION_DIM, VOCAB_SIZE, GivenPatches, random_texts, randomise
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from qformers.demo.dinov2 import minilm_folder
from qformers.errors import CheckpointError, ConfigError
from qformers.models.bert import started_from_bert
from qformers.models.config import ModelConfig
from qformers.models.masks import unimodal_mask
from qformers.models.presets import build_stage1
from qformers.models.stage1 import Stage1Model
from qformers.objectives.stage1 import query_diversity

TINY_BERT = {
    "vocab_size": VOCAB_SIZE - 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def save_bert(folder: Path, kind: type = BertModel, **changes) -> BertModel | BertForMaskedLM:
    torch.manual_seed(0)
    bert = kind(BertConfig(**{**TINY_BERT, **changes})).eval()
    randomise(bert)
    bert.save_pretrained(folder)
    return bert


def start_from(folder: Path) -> Stage1Model:
    config = ModelConfig(preset="tiny", text_encoder=str(folder), num_queries=4)
    return build_stage1(config, VOCAB_SIZE, GivenPatches(VISION_DIM)).eval()


@torch.no_grad()
def test_text_transformer_is_the_bert_it_started_from(tmp_path):
    bert = save_bert(tmp_path)
    qformer = start_from(tmp_path).qformer
    for lengths in ([6, 3, 9], [5]):
        input_ids, attention_mask = random_texts(lengths)
        rows = len(lengths)
        text = qformer.text_embeddings(input_ids)
        _, outputs = qformer(qformer.no_queries(rows), text, unimodal_mask(0, attention_mask), [])
        expected = bert(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        torch.testing.assert_close(outputs[attention_mask], expected[attention_mask], atol=1e-5, rtol=0)


def test_names_that_count_as_started_from_bert_are_those_that_change(tmp_path):
    """[DEC]'s row and the vocabulary head belong to no BertModel; every other weight is copied or it is not."""
    save_bert(tmp_path)
    torch.manual_seed(1)
    fresh = build_stage1(
        ModelConfig(preset="tiny", start_from_text_encoder=False, num_queries=4), VOCAB_SIZE, GivenPatches(VISION_DIM)
    )
    torch.manual_seed(1)
    started = start_from(tmp_path)
    changed = {
        name
        for (name, before), after in zip(fresh.named_parameters(), started.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert changed == {name for name in changed | dict(fresh.named_parameters()).keys() if started_from_bert(name)}


@torch.no_grad()
def test_query_feed_forward_is_the_text_s_and_the_rest_is_random(tmp_path):
    save_bert(tmp_path)
    model = start_from(tmp_path)
    for block in model.qformer.blocks:
        for ours, text in ((block.query_ffn, block.text_ffn), (block.query_ffn_norm, block.text_ffn_norm)):
            for mine, theirs in zip(ours.parameters(), text.parameters(), strict=True):
                assert torch.equal(mine, theirs)
                assert mine.data_ptr() != theirs.data_ptr(), "copied once, trained apart"
    fresh = [
        model.qformer.query_tokens,
        model.qformer.text_embeddings.word.weight[model.dec_id],
        *(block.cross_attention.kv.weight for block in model.qformer.blocks if block.cross_attention),
    ]
    for weight in fresh:
        assert 0.01 < weight.std() < 0.03  # N(0, 0.02)
    queries = model.encode_image(torch.randn(1, PATCHES, VISION_DIM)).query_outputs[0]
    assert (queries[0] - queries[1]).abs().max() > 1e-3, "queries that start equal stay equal for ever"


@torch.no_grad()
def test_queries_may_start_as_words_of_the_bert_at_their_places(tmp_path):
    """After the LayerNorm, which takes their size away, they are what Hugging Face's BERT makes of some words."""
    bert = save_bert(tmp_path)
    config = ModelConfig(preset="tiny", text_encoder=str(tmp_path), num_queries=4, query_start="words")
    qformer = build_stage1(config, VOCAB_SIZE, GivenPatches(VISION_DIM)).qformer
    assert qformer.query_tokens.std().item() == pytest.approx(0.02)
    queries = qformer.embedding_norm(qformer.query_tokens)
    for place, query in enumerate(queries):
        everywhere = torch.arange(VOCAB_SIZE - 1)[:, None].expand(-1, place + 1)
        words = bert.embeddings(input_ids=everywhere)[:, place]
        assert (words - query).abs().amax(dim=1).min() < 1e-4  # the LayerNorm's epsilon weighs more on small tokens


def test_more_queries_than_places(tmp_path):
    save_bert(tmp_path)
    config = ModelConfig(preset="tiny", text_encoder=str(tmp_path), num_queries=513, query_start="words")
    with pytest.raises(ConfigError, match=r"513 queries.*512 positions"):
        build_stage1(config, VOCAB_SIZE, GivenPatches(VISION_DIM))


@pytest.mark.assets
@torch.no_grad()
def test_minilm_keeps_words_apart_and_mixes_noise():
    """Of what the last block says of a picture, the share that differs between queries; four seeds.

    Half of each picture is common to its patches, as in an image encoder's outputs.
    """
    shares = {}
    for start in ("words", "noise"):
        config = ModelConfig(preset="small", text_encoder=str(minilm_folder()), num_queries=8, query_start=start)
        for seed in range(4):
            torch.manual_seed(seed)
            model = build_stage1(config, 30523, GivenPatches(384)).eval()
            patches = torch.randn(8, 1, 384) + torch.randn(8, 82, 384)
            shares[start, seed] = query_diversity(model.encode_image(patches).query_outputs).item()
    for seed in range(4):
        assert shares["words", seed] > 0.1 > shares["noise", seed]


@torch.no_grad()
def test_vocabulary_head_is_taken_where_there_is_one(tmp_path):
    bert = save_bert(tmp_path, BertForMaskedLM)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(start_from(tmp_path).token_logits(hidden)[:, :-1], bert.cls(hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 3}, "3 layers.*2"),
        ({"hidden_size": 64, "intermediate_size": 128}, r"\(49, 32\).*\(49, 64\)"),
        ({"intermediate_size": 128}, r"\(64, 32\).*\(128, 32\)"),
        ({"num_attention_heads": 2}, "2 attention heads.*4"),  # the same shapes, so nothing else would notice
        ({"vocab_size": VOCAB_SIZE - 10}, "40 words.*49"),
        ({"vocab_size": VOCAB_SIZE + 10}, "60 words.*49"),
        ({"max_position_embeddings": 128}, r"\(512, 32\).*\(128, 32\)"),
    ],
)
def test_a_bert_of_another_shape(tmp_path, changes, told):
    save_bert(tmp_path, **changes)
    refused(tmp_path, told)


def test_what_is_no_bert(tmp_path):
    refused(tmp_path / "missing", "missing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "gpt2")
    refused(tmp_path / "gpt2", "gpt2")


def test_a_damaged_bert(tmp_path):
    save_bert(tmp_path)
    weights = tmp_path / "model.safetensors"
    kept = {name: weight for name, weight in load_file(weights).items() if "layer.1.attention" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    refused(tmp_path, "layer.1.attention")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path, "no BERT can be loaded")


def refused(folder: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as raised:
        start_from(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
