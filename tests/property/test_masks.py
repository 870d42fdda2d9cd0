"""What may not leak, and what order may not change: any lengths, any texts, in double precision."""

from __future__ import annotations

import torch
from helpers import FIRST_WORD, PATCHES, VISION_DIM, VOCAB_SIZE, random_texts, tiny_stage1
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qformers.models.masks import bidirectional_mask, causal_mask, unimodal_mask

MODEL = tiny_stage1(cross_attention_frequency=1).double().eval()
QFORMER = MODEL.qformer
SAME = {"atol": 1e-12, "rtol": 0}

lengths = st.lists(st.integers(2, 8), min_size=1, max_size=4)
seeds = st.integers(0, 10_000)
few = settings(max_examples=25)


def patches_of(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, PATCHES, VISION_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def changed_from(input_ids: Tensor, position: int) -> Tensor:
    """Another word everywhere from `position` on."""
    others = FIRST_WORD + (input_ids - FIRST_WORD + 7) % (VOCAB_SIZE - 1 - FIRST_WORD)
    return torch.cat([input_ids[:, :position], others[:, position:]], dim=1)


def run(make_mask, input_ids: Tensor, attention_mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(input_ids)
    mask = make_mask(QFORMER.num_queries, attention_mask)
    memory = MODEL.remember(patches)
    return QFORMER(QFORMER.queries(rows), QFORMER.text_embeddings(input_ids), mask, [memory])


@few
@given(lengths, seeds)
@torch.no_grad()
def test_text_never_reaches_the_queries_under_the_unimodal_and_causal_masks(lengths, seed):
    input_ids, attention_mask = random_texts(lengths, seed)
    patches = patches_of(len(lengths), seed)
    alone = MODEL.encode_image(patches).query_outputs
    for make_mask in (unimodal_mask, causal_mask):
        for text in (input_ids, changed_from(input_ids, 0)):
            queries, _ = run(make_mask, text, attention_mask, patches)
            torch.testing.assert_close(queries, alone, **SAME)
    queries, _ = run(bidirectional_mask, input_ids, attention_mask, patches)
    assert ((queries - alone).abs().amax(dim=(1, 2)) > 1e-6).all(), "under ITM's mask it must"


@few
@given(lengths, seeds)
@torch.no_grad()
def test_images_reach_the_text_under_the_causal_and_not_under_the_unimodal_mask(lengths, seed):
    input_ids, attention_mask = random_texts(lengths, seed)
    here, there = patches_of(len(lengths), seed), patches_of(len(lengths), seed + 1)
    difference = {
        make_mask: run(make_mask, input_ids, attention_mask, here)[1]
        - run(make_mask, input_ids, attention_mask, there)[1]
        for make_mask in (unimodal_mask, causal_mask)
    }
    assert difference[unimodal_mask].abs().max() <= SAME["atol"]
    assert (difference[causal_mask].abs().amax(dim=-1) > 1e-6)[attention_mask].all()


@few
@given(lengths, seeds, st.data())
@torch.no_grad()
def test_a_token_never_changes_an_output_before_it_under_the_causal_mask(lengths, seed, data):
    input_ids, attention_mask = random_texts(lengths, seed)
    patches = patches_of(len(lengths), seed)
    token = data.draw(st.integers(0, max(lengths) - 1))
    changed = changed_from(input_ids, token)
    _, text = run(causal_mask, input_ids, attention_mask, patches)
    _, other = run(causal_mask, changed, attention_mask, patches)
    torch.testing.assert_close(other[:, :token], text[:, :token], **SAME)
    seen = attention_mask[:, token:]
    assert ((other - text)[:, token:].abs().amax(dim=-1) > 1e-9)[seen].all(), "and always those after it"


@few
@given(lengths, seeds)
@torch.no_grad()
def test_padding_never_matters(lengths, seed):
    input_ids, attention_mask = random_texts(lengths, seed)
    patches = patches_of(len(lengths), seed)
    noise, _ = random_texts([max(lengths) + 3] * len(lengths), seed + 1)
    padded = noise.clone()
    padded[:, : input_ids.shape[1]] = torch.where(attention_mask, input_ids, noise[:, : input_ids.shape[1]])
    padded_mask = torch.zeros(padded.shape, dtype=torch.bool)
    padded_mask[:, : attention_mask.shape[1]] = attention_mask
    for make_mask in (unimodal_mask, causal_mask, bidirectional_mask):
        queries, text = run(make_mask, input_ids, attention_mask, patches)
        other_queries, other_text = run(make_mask, padded, padded_mask, patches)
        torch.testing.assert_close(other_queries, queries, **SAME)
        torch.testing.assert_close(other_text[padded_mask], text[attention_mask], **SAME)


@few
@given(lengths, seeds, st.randoms(use_true_random=False))
@torch.no_grad()
def test_order_of_queries_and_of_rows_is_only_order(lengths, seed, random):
    input_ids, attention_mask = random_texts(lengths, seed)
    patches = patches_of(len(lengths), seed)
    memory = MODEL.remember(patches)
    order = random.sample(range(QFORMER.num_queries), QFORMER.num_queries)
    rows = random.sample(range(len(lengths)), len(lengths))
    for make_mask in (unimodal_mask, causal_mask, bidirectional_mask):
        queries, text = run(make_mask, input_ids, attention_mask, patches)
        reordered, same_text = QFORMER(
            QFORMER.queries(len(lengths))[:, order],
            QFORMER.text_embeddings(input_ids),
            make_mask(QFORMER.num_queries, attention_mask),
            [memory],
        )
        torch.testing.assert_close(reordered, queries[:, order], **SAME)
        torch.testing.assert_close(same_text, text, **SAME)
        row_queries, row_text = run(make_mask, input_ids[rows], attention_mask[rows], patches[rows])
        torch.testing.assert_close(row_queries, queries[rows], **SAME)
        torch.testing.assert_close(row_text, text[rows], **SAME)


@few
@given(lengths, seeds)
@torch.no_grad()
def test_the_packed_pass_is_the_three_passes(lengths, seed):
    input_ids, attention_mask = random_texts(lengths, seed)
    patches = patches_of(len(lengths), seed)
    packed = MODEL.packed_pass(patches, input_ids, attention_mask)
    image = MODEL.encode_image(patches)
    torch.testing.assert_close(packed.image.query_outputs, image.query_outputs, **SAME)
    torch.testing.assert_close(packed.image.image_features, image.image_features, **SAME)
    torch.testing.assert_close(packed.text_features, MODEL.encode_text(input_ids, attention_mask), **SAME)
    following = MODEL.next_token_logits(image.memory, input_ids, attention_mask)[:, :-1]
    predicted = attention_mask[:, 1:]
    logits = MODEL.token_logits(packed.generative_outputs[predicted])
    torch.testing.assert_close(logits, following[predicted], **SAME)


@few
@given(lengths, seeds, st.integers(1, 3))
@torch.no_grad()
def test_images_shared_by_rows_or_chosen_again_score_as_if_copied(lengths, seed, shared):
    """What ITM and re-ranking stand on: neighbours share keys, chosen images are gathered, both at once."""
    images = len(lengths)
    input_ids, attention_mask = random_texts([length for length in lengths for _ in range(shared)] + lengths, seed)
    patches = patches_of(images, seed)
    chosen = torch.arange(images).flip(0)
    memory = MODEL.remember(patches)
    logits = MODEL.match_logits([memory.shared_by(shared), memory.select(chosen)], input_ids, attention_mask)
    copied = torch.cat([patches.repeat_interleave(shared, dim=0), patches[chosen]])
    one_by_one = [
        MODEL.match_logits([MODEL.remember(copied[row, None])], input_ids[row, None], attention_mask[row, None])
        for row in range(len(copied))
    ]
    torch.testing.assert_close(logits, torch.cat(one_by_one), **SAME)
