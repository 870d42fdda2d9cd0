"""The Q-Former and the retrieval heads against Hugging Face's BLIP-2 with the same weights, in fp32."""

from __future__ import annotations

import pytest
import torch
from helpers import GivenPatches, random_texts, randomise, tiny_stage1
from hf_blip2 import TOY_VISION, give_weights
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from qformers.models.config import ModelConfig
from qformers.models.masks import bidirectional_mask
from qformers.models.presets import QFormerShape, build_qformer, build_stage1
from qformers.objectives.itc import max_over_queries

TOLERANCE = {"atol": 1e-5, "rtol": 0}
TOLERANCE_DOUBLE = {"atol": 1e-12, "rtol": 0}


def pair(layers: int, dim: int, heads: int, vision_dim: int, vocab_size: int, num_queries: int):
    """Our Q-Former and theirs, with one set of random weights."""
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        encoder_hidden_size=vision_dim,
        use_qformer_text_input=True,
        attn_implementation="eager",
    )
    theirs, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config).eval()
    if dim < 100:  # at full width the usual N(0, 0.02) is large enough to matter
        randomise(theirs, std=0.2)
        randomise(embeddings, std=0.2)
    shape = QFormerShape(layers=layers, dim=dim, heads=heads, ffn_dim=4 * dim)
    with torch.device("meta"):
        ours = build_qformer(ModelConfig(num_queries=num_queries), shape, vision_dim, vocab_size).eval()
    give_weights(ours, theirs, torch.randn(num_queries, dim), embeddings)
    return ours, theirs, embeddings


TOY = {"layers": 5, "dim": 32, "heads": 4, "vision_dim": 24, "vocab_size": 50, "num_queries": 4}
FULL = {"layers": 12, "dim": 768, "heads": 12, "vision_dim": 1408, "vocab_size": 1000, "num_queries": 32}


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [
        (TOY, torch.float64, TOLERANCE_DOUBLE),
        (TOY, torch.float32, TOLERANCE),
        (FULL, torch.float32, TOLERANCE),
    ],
    ids=["toy_double", "toy", "full_width"],
)
@torch.no_grad()
def test_query_and_text_outputs(size, dtype, tolerance):
    ours, theirs, embeddings = (part.to(dtype) for part in pair(**size))
    num_queries = size["num_queries"]
    for lengths in ([6, 3, 9], [5]):
        rows = len(lengths)
        patches = torch.randn(rows, 7, size["vision_dim"], dtype=dtype)
        input_ids, attention_mask = random_texts(lengths)
        memory = ours.remember(patches)
        query_tokens = ours.query_tokens.expand(rows, -1, -1)

        alone, no_text = ours(ours.queries(rows), ours.no_text(rows), None, [memory])
        expected = theirs(query_embeds=query_tokens, encoder_hidden_states=patches).last_hidden_state
        torch.testing.assert_close(alone, expected, **tolerance)
        assert no_text.shape[1] == 0

        queries, text = ours(
            ours.queries(rows),
            ours.text_embeddings(input_ids),
            bidirectional_mask(num_queries, attention_mask),
            [memory],
        )
        expected = theirs(
            query_embeds=embeddings(input_ids=input_ids, query_embeds=query_tokens),
            query_length=num_queries,
            attention_mask=torch.cat([torch.ones(rows, num_queries), attention_mask], dim=1),
            encoder_hidden_states=patches,
        ).last_hidden_state
        torch.testing.assert_close(queries, expected[:, :num_queries], **tolerance)
        torch.testing.assert_close(text[attention_mask], expected[:, num_queries:][attention_mask], **tolerance)
        assert (queries - alone).abs().max() > 0.01, "the text did not reach the queries: the test sees nothing"


@torch.no_grad()
def test_stage1_scores_equal_the_retrieval_model_s():
    """ITC features and similarities and ITM logits of `Blip2ForImageTextRetrieval`, pixels in."""
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=TOY_VISION,
        qformer_config={
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "encoder_hidden_size": 24,
            "use_qformer_text_input": True,
        },
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=None,
    )
    theirs = Blip2ForImageTextRetrieval(config).eval()
    randomise(theirs)
    ours = tiny_stage1(vision_dim=24).eval()
    give_weights(ours.qformer, theirs.qformer, theirs.query_tokens[0], theirs.embeddings)
    ours.vision_norm.load_state_dict(theirs.vision_model.post_layernorm.state_dict())
    ours.vision_norm.eps = theirs.vision_model.post_layernorm.eps  # 1e-6 there, the authors' 1e-5 here
    for head in ("vision_projection", "text_projection", "itm_head"):
        getattr(ours, head).load_state_dict(getattr(theirs, head).state_dict())

    for lengths in ([4, 7, 3], [5]):
        pixel_values = torch.randn(len(lengths), 3, 28, 28)
        input_ids, attention_mask = random_texts(lengths)
        vision = theirs.vision_model
        patches = vision.encoder(inputs_embeds=vision.embeddings(pixel_values)).last_hidden_state
        image = ours.encode_image(patches)
        text_features = ours.encode_text(input_ids, attention_mask)
        contrastive = theirs(pixel_values, input_ids, attention_mask)
        torch.testing.assert_close(image.image_features, contrastive.image_embeds, **TOLERANCE)
        torch.testing.assert_close(text_features, contrastive.text_embeds, **TOLERANCE)
        similarity = max_over_queries(image.image_features, text_features)
        torch.testing.assert_close(similarity, contrastive.logits_per_image, **TOLERANCE)

        matching = theirs(pixel_values, input_ids, attention_mask, use_image_text_matching_head=True)
        logits = ours.match_logits([image.memory], input_ids, attention_mask)
        torch.testing.assert_close(logits, matching.logits_per_image, **TOLERANCE)


def test_parameter_count_of_the_paper_s_model():
    """PAPER: 188 M in all; 186.7 M in the authors' stage 1 without the ViT."""
    dim, ffn, vision, vocabulary, embed = 768, 3072, 1408, 30523, 256

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    norm = 2 * dim
    feed_forward = linear(dim, ffn) + linear(ffn, dim) + norm
    block = 4 * linear(dim, dim) + norm + 2 * feed_forward
    cross_attention = 2 * linear(dim, dim) + 2 * linear(vision, dim) + norm
    embeddings = vocabulary * dim + 512 * dim + 32 * dim + norm
    token_head = linear(dim, dim) + norm + vocabulary  # its output weights are the word embeddings
    heads = 2 * linear(dim, embed) + linear(dim, 2) + token_head
    vision_norm, temperature = 2 * vision, 1
    expected = embeddings + 12 * block + 6 * cross_attention + heads + vision_norm + temperature
    assert expected == 186_705_470

    with torch.device("meta"):
        encoder = GivenPatches(vision)
        model = build_stage1(ModelConfig(start_from_text_encoder=False), vocabulary, encoder)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
