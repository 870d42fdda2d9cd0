"""Stage 2 against Hugging Face's own models with the same weights: losses to 1e-5, generated tokens one for one."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from hf_blip2 import TOY_VISION, give_weights
from toy_language import (
    END,
    FAMILIES,
    PAD,
    START,
    VOCABULARY,
    toy_language_model,
    toy_prompts,
    toy_stage2,
    toy_transformers_model,
)
from transformers import Blip2Config, Blip2ForConditionalGeneration

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.models.config import GenerationSettings
from qformers.models.language import LanguageModel
from qformers.objectives.lm import Stage2Objective

TOLERANCE = {"atol": 1e-5, "rtol": 0}  # fp32 rounding: the same products in another order
QUERIES = 4
IMAGE_TOKEN = VOCABULARY - 1
PROMPTS = [[4, 5, 6], [4, 7], [8, 9, 10, 11, 12]]


def pair(family: str):
    """Our stage-2 model and theirs, with one set of random weights."""
    torch.manual_seed(0)
    text_config = toy_transformers_model(family).config
    config = Blip2Config(
        vision_config=TOY_VISION,
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "encoder_hidden_size": 24,
        },
        text_config=text_config.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    theirs = Blip2ForConditionalGeneration(config).eval()
    randomise(theirs, std=0.25)
    ours = toy_stage2(family).eval()
    give_weights(ours.qformer, theirs.qformer, theirs.query_tokens[0])
    ours.vision_norm.load_state_dict(theirs.vision_model.post_layernorm.state_dict())
    ours.vision_norm.eps = theirs.vision_model.post_layernorm.eps  # 1e-6 there, the authors' 1e-5 here
    ours.language_projection.load_state_dict(theirs.language_projection.state_dict())
    ours.language_model = LanguageModel(theirs.language_model, END, PAD)
    return ours, theirs


@torch.no_grad()
def pictures(theirs: Blip2ForConditionalGeneration, rows: int):
    """Pixels, and what our Q-Former reads of them: their encoder's output before its last norm."""
    pixel_values = torch.randn(rows, 3, 28, 28, generator=torch.Generator().manual_seed(rows))
    vision = theirs.vision_model
    return pixel_values, vision.encoder(inputs_embeds=vision.embeddings(pixel_values)).last_hidden_state


@pytest.mark.parametrize("rows", [[[4, 5, 6, END]], [[4, 5, 6, END], [7, END], [8, 9, 10, 11, END]]])
def test_loss_of_a_decoder_only_model(rows):
    ours, theirs = pair("opt")
    pixel_values, patches = pictures(theirs, len(rows))
    read = [[START, *row] for row in rows]
    input_ids, mask = toy_prompts(read)
    labels = input_ids.masked_fill(~mask, IGNORED_LABEL)
    labels[:, 0] = IGNORED_LABEL  # the start token is given
    batch = Batch(input_ids, mask, torch.arange(len(rows)), ("",) * len(rows), patch_embeds=patches, labels=labels)
    loss = Stage2Objective(ours)(batch).losses["lm"]

    image = torch.full((len(rows), QUERIES), IMAGE_TOKEN)
    expected = theirs(
        pixel_values=pixel_values,
        input_ids=torch.cat([image, input_ids], dim=1),
        attention_mask=torch.cat([torch.ones_like(image), mask.long()], dim=1),
        labels=torch.cat([torch.full_like(image, IGNORED_LABEL), labels], dim=1),
    ).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert loss > 0.5


@pytest.mark.parametrize("rows", [1, 3])
def test_loss_of_an_encoder_decoder_model(rows):
    ours, theirs = pair("t5")
    pixel_values, patches = pictures(theirs, rows)
    input_ids, mask = toy_prompts([[*row, END] for row in PROMPTS[:rows]])
    said, said_mask = toy_prompts([[13, 14, END], [15, END], [16, 17, 18, 19, END]][:rows])
    labels = said.masked_fill(~said_mask, IGNORED_LABEL)
    batch = Batch(input_ids, mask, torch.arange(rows), ("",) * rows, patch_embeds=patches, labels=labels)
    loss = Stage2Objective(ours)(batch).losses["lm"]
    image = torch.full((rows, QUERIES), IMAGE_TOKEN)
    expected = theirs(
        pixel_values=pixel_values,
        input_ids=torch.cat([image, input_ids], dim=1),
        attention_mask=torch.cat([torch.ones_like(image), mask.long()], dim=1),
        labels=labels,
    ).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)


@pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beam"])
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_generated_tokens(family, beams):
    """Row by row, since theirs takes no prompts of different length unpadded; ours gets them all at once."""
    ours, theirs = pair(family)
    pixel_values, patches = pictures(theirs, 3)
    settings = GenerationSettings(max_new_tokens=12, min_new_tokens=0, num_beams=beams, length_penalty=0.7)
    for prompts in (PROMPTS, [[], [], []]):
        start, end = ([START], []) if family == "opt" else ([], [END])
        rows = [start + prompt + end for prompt in prompts]
        input_ids, mask = toy_prompts(rows)
        said = ours.language_model.generate(ours.visual_prompts(patches), input_ids, mask, settings)
        for row, prompt in enumerate(rows):
            expected = theirs.generate(
                pixel_values=pixel_values[row : row + 1],
                input_ids=torch.tensor([[IMAGE_TOKEN] * QUERIES + prompt]),
                max_new_tokens=12,
                num_beams=beams,
                length_penalty=0.7,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=PAD,
            )[0].tolist()
            new = expected[QUERIES + len(prompt) :] if family == "opt" else expected[1:]
            assert until_end(said[row].tolist()) == until_end(new), f"row {row}"


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_the_model_s_own_loss(family):
    """Without visual prompts the family's embedding scale, positions and masks must be what its own forward has."""
    theirs = toy_transformers_model(family)
    ours = LanguageModel(theirs, END, PAD)
    rows = [[START, *prompt, END] for prompt in PROMPTS]
    input_ids, mask = toy_prompts(rows)
    nothing = torch.zeros(3, 0, ours.dim)
    if ours.is_encoder_decoder:
        target_ids, target_mask = toy_prompts([[13, 14, END], [15, END], [16, 17, 18, END]])
    else:
        target_ids, target_mask = input_ids, mask.clone()
        target_mask[:, :2] = False
    labels = target_ids.masked_fill(~target_mask, IGNORED_LABEL)
    logits = ours(nothing, input_ids, mask, target_ids, target_mask)
    loss = torch.nn.functional.cross_entropy(logits, target_ids[target_mask])
    expected = theirs(input_ids=input_ids, attention_mask=mask.long(), labels=labels).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_alone_and_in_any_batch(family, beams):
    ours = toy_language_model(family)
    visual = torch.randn(4, QUERIES, ours.dim, generator=torch.Generator().manual_seed(1))
    rows = [[START, *prompt] for prompt in [*PROMPTS, []]]
    settings = GenerationSettings(max_new_tokens=8, num_beams=beams, repetition_penalty=1.3)
    ids, mask = toy_prompts(rows)
    together = [until_end(row) for row in ours.generate(visual, ids, mask, settings).tolist()]
    for row in range(4):
        alone = ours.generate(visual[row : row + 1], *toy_prompts([rows[row]]), settings)
        assert until_end(alone[0].tolist()) == together[row]
    assert len({tuple(answer) for answer in together}) > 1, "all answers are one: the test sees nothing"
