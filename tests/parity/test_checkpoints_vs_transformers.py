"""Hugging Face's checkpoints: what transformers makes of a folder and what we make of it are one, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers import random_texts
from hf_blip2 import TOY_VISION
from toy_blip2 import (
    BERT_VOCABULARY,
    IMAGE_TOKEN,
    KINDS,
    QUERIES,
    behind_the_picture,
    save_toy,
    toy_pixels,
)
from toy_language import END, PAD, START, toy_prompts, toy_tokenizer, toy_transformers_model
from toy_run import toy_config, write_toy_data
from transformers import AutoProcessor, Blip2VisionConfig, Blip2VisionModel

import qformers
from qformers.convert.run import convert
from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.models.config import GenerationSettings, LanguageConfig
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.lm import Stage2Objective
from qformers.objectives.stage1 import Stage1Objective
from qformers.predictor import Predictor
from qformers.training.loop import train

TOLERANCE = {"atol": 1e-5, "rtol": 0}  # fp32 rounding: the same products in another order
PROMPTS = [[4, 5, 6], [4, 7], [8, 9, 10, 11, 12]]
INSTRUCTION_LENGTHS = [5, 3, 6]


def instructions(rows: int):
    """Ids within the toy BERT's words, and their mask."""
    ids, mask = random_texts(INSTRUCTION_LENGTHS[:rows])
    return ids % (BERT_VOCABULARY - 1), mask


def reads(kind: str, rows: int):
    """What the Q-Former of the kind reads beside the pictures."""
    return instructions(rows) if kind.startswith("instruct") else None


def theirs_reads(kind: str, rows: int) -> dict:
    if not kind.startswith("instruct"):
        return {}
    ids, mask = instructions(rows)
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask.long()}


@torch.no_grad()
def assert_same_prompts(kind: str, ours, theirs, rows: int) -> None:
    """Query outputs, and visual prompts made of them."""
    pixels = toy_pixels(rows)
    patches, text = ours.vision_encoder(pixels), reads(kind, rows)
    memory = ours.remember(patches)
    outputs = ours.query(memory) if text is None else ours.query_with_text([memory], *text)
    if kind == "model":
        expected = theirs.get_qformer_features(pixels)
        torch.testing.assert_close(outputs, expected, **TOLERANCE)
        return
    features = theirs.get_image_features(pixels, **theirs_reads(kind, rows), return_dict=True)
    torch.testing.assert_close(outputs, features.qformer_outputs.last_hidden_state[:, :QUERIES], **TOLERANCE)
    torch.testing.assert_close(ours.visual_prompts(patches, text), features.pooler_output, **TOLERANCE)


@torch.no_grad()
def assert_same_loss(kind: str, ours, theirs, rows: int) -> None:
    encoder_decoder = KINDS[kind][1] == "t5"
    pixels = toy_pixels(rows)
    start, end = ([], [END]) if encoder_decoder else ([START], [])
    input_ids, mask = toy_prompts([[*start, *prompt, *end] for prompt in PROMPTS[:rows]])
    labels, label_mask = toy_prompts([[13, 14, END], [15, END], [16, 17, 18, END]][:rows])
    labels = labels.masked_fill(~label_mask, IGNORED_LABEL) if encoder_decoder else input_ids.masked_fill(~mask, -100)
    if not encoder_decoder:
        labels[:, 0] = IGNORED_LABEL
    target_mask = labels != IGNORED_LABEL
    logits = ours.language_model(
        ours.visual_prompts(ours.vision_encoder(pixels), reads(kind, rows)),
        input_ids,
        mask,
        labels.masked_fill(~target_mask, 0),
        target_mask,
    )
    loss = torch.nn.functional.cross_entropy(logits, labels[target_mask])
    image_labels = torch.full((rows, QUERIES), IGNORED_LABEL)
    expected = theirs(
        pixel_values=pixels,
        input_ids=behind_the_picture(input_ids),
        attention_mask=torch.cat([torch.ones_like(image_labels), mask.long()], dim=1),
        labels=labels if encoder_decoder else torch.cat([image_labels, labels], dim=1),
        **theirs_reads(kind, rows),
    ).loss
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert loss > 0.5


def assert_same_words(kind: str, ours, theirs, beams: int) -> set[tuple[int, ...]]:
    """Ours all at once, theirs row by row, since theirs takes no prompts of different length unpadded."""
    encoder_decoder = KINDS[kind][1] == "t5"
    pixels, text = toy_pixels(3), reads(kind, 3)
    settings = GenerationSettings(max_new_tokens=12, min_new_tokens=0, num_beams=beams, length_penalty=0.7)
    start, end = ([], [END]) if encoder_decoder else ([START], [])
    rows = [[*start, *prompt, *end] for prompt in PROMPTS]
    with torch.no_grad():
        visual = ours.visual_prompts(ours.vision_encoder(pixels), text)
    said = ours.language_model.generate(visual, *toy_prompts(rows), settings)
    answers = set()
    for row, prompt in enumerate(rows):
        alone = {name: value[row : row + 1] for name, value in theirs_reads(kind, 3).items()}
        if alone:
            length = INSTRUCTION_LENGTHS[row]
            alone = {name: value[:, :length] for name, value in alone.items()}
        expected = theirs.generate(
            pixel_values=pixels[row : row + 1],
            input_ids=behind_the_picture(torch.tensor([prompt])),
            max_new_tokens=12,
            num_beams=beams,
            length_penalty=0.7,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=PAD,
            **alone,
        )[0].tolist()
        new = expected[1:] if encoder_decoder else expected[QUERIES + len(prompt) :]
        assert until_end(said[row].tolist()) == until_end(new), f"row {row}"
        answers.add(tuple(until_end(new)))
    return answers


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


@torch.no_grad()
def assert_same_matches(ours, theirs) -> None:
    """ITC and ITM, the softmax applied once."""
    for rows in (1, 3):
        pixels, (input_ids, mask) = toy_pixels(rows), instructions(rows)
        image = ours.encode_image(ours.vision_encoder(pixels))
        text = ours.encode_text(input_ids, mask)
        ids, places = behind_the_picture(input_ids, BERT_VOCABULARY), torch.ones(rows, QUERIES, dtype=torch.long)
        attention_mask = torch.cat([places, mask.long()], dim=1)
        contrastive = theirs(pixels, ids, attention_mask)
        torch.testing.assert_close(image.image_features, contrastive.image_embeds, **TOLERANCE)
        torch.testing.assert_close(text, contrastive.text_embeds, **TOLERANCE)
        similarity = torch.einsum("iqd,td->itq", image.image_features, text).amax(-1)
        torch.testing.assert_close(similarity, contrastive.logits_per_image, **TOLERANCE)
        matching = theirs(pixels, ids, attention_mask, use_image_text_matching_head=True).logits_per_image
        logits = ours.match_logits([image.memory], input_ids, mask)
        torch.testing.assert_close(logits, matching, **TOLERANCE)
        torch.testing.assert_close(logits.softmax(-1)[:, 1], matching.softmax(-1)[:, 1], **TOLERANCE)


def assert_same_model(kind: str, ours, theirs) -> None:
    if kind == "retrieval":
        assert_same_matches(ours, theirs)
        return
    for rows in (1, 3):
        assert_same_prompts(kind, ours, theirs, rows)
        assert_same_loss(kind, ours, theirs, rows)
    if kind != "model":  # which does not generate
        for beams in (1, 4):
            assert_same_words(kind, ours, theirs, beams)


def in_transformers(kind: str, folder: Path):
    """The folder as transformers opens it; nothing may be missing or left over."""
    model_class = getattr(transformers, KINDS[kind][0])
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_gives_the_same_here(kind, tmp_path):
    theirs = save_toy(kind, tmp_path)
    ours = qformers.load(tmp_path).model
    assert_same_model(kind, ours, theirs)
    if kind not in ("model", "retrieval"):
        assert len(assert_same_words(kind, ours, theirs, beams=1)) > 1, "all answers are one: the test sees nothing"


@pytest.mark.parametrize("kind", ["opt", "retrieval", "instruct_llama"])
def test_shards_are_read_as_one(kind, tmp_path):
    theirs = save_toy(kind, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(kind, qformers.load(tmp_path).model, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["opt", "retrieval", "instruct_t5"])
def test_half_precision_is_read_without_loss(kind, dtype, tmp_path):
    """In float32 both compute with the very numbers that are stored."""
    theirs = save_toy(kind, tmp_path, dtype).float()
    assert_same_model(kind, qformers.load(tmp_path, dtype=torch.float32).model, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_after_training_here_transformers_gives_the_same(kind, tmp_path):
    """Load theirs, train a few steps, save ours, convert to theirs."""
    save_toy(kind, tmp_path / "theirs")
    model = qformers.load(tmp_path / "theirs")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    train_a_little(model)
    changed = [name for name, tensor in model.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"qformer.query_tokens", "vision_norm.weight"} <= set(changed)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    assert_same_model(kind, model.model, in_transformers(kind, tmp_path / "again"))


def train_a_little(model: Predictor) -> None:
    ours = model.model.train()
    ids, mask = instructions(3)
    if model.loaded.language is None:
        objective = Stage1Objective(ours, Stage1LossConfig())
        batch = Batch(ids, mask, torch.arange(3), ("",) * 3, pixel_values=toy_pixels(3))
    else:
        objective = Stage2Objective(ours)
        words, words_mask = toy_prompts([[START, 4, 5, END], [START, 6, END], [START, 7, 8, 9, END]])
        labels = words.masked_fill(~words_mask, IGNORED_LABEL)
        batch = Batch(words, words_mask, torch.arange(3), ("",) * 3, pixel_values=toy_pixels(3), labels=labels)
    optimiser = torch.optim.AdamW([weight for weight in ours.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(3):
        objective(batch).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    ours.eval()


def test_a_model_trained_from_nothing_is_one_for_transformers(tmp_path):
    """Ours never saw a folder of theirs: <image> is made, and the language model grows a row for it."""
    write_toy_data(tmp_path)
    torch.manual_seed(1)
    Blip2VisionModel(Blip2VisionConfig(**TOY_VISION)).save_pretrained(tmp_path / "encoder")
    toy_transformers_model("gpt2").save_pretrained(tmp_path / "gpt2")
    toy_tokenizer(tmp_path / "gpt2")
    stage1 = train(toy_config(tmp_path, tmp_path / "one", steps=4, precision="fp32"))
    language = LanguageConfig(path=str(tmp_path / "gpt2"))
    settings = {"stage": 2, "start": str(tmp_path / "one"), "language": language}
    stage2 = train(toy_config(tmp_path, tmp_path / "two", steps=4, precision="fp32", **settings))

    convert(stage1.model, tmp_path / "hf1", "hf")
    ours = qformers.load(stage1.model)
    theirs = in_transformers("retrieval", tmp_path / "hf1")
    pictures, texts = [tmp_path / "0.png", tmp_path / "1.png"], ["a red square", "the dark line"]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf1")
    inputs = processor(images=[torch.zeros(3, 28, 28)] * 2, text=texts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = ours.preprocess(pictures)
    with torch.no_grad():
        similarity = theirs(**inputs).logits_per_image
        # vision_norm has eps 1e-5 here and one eps for all norms there, 1e-6
        torch.testing.assert_close(ours.itc(pictures, texts), similarity, atol=1e-3, rtol=0)

    convert(stage2.model, tmp_path / "hf2", "hf")
    theirs = in_transformers("opt", tmp_path / "hf2")
    assert theirs.config.text_config.vocab_size == 25 and theirs.config.image_token_index == IMAGE_TOKEN
    assert theirs.config.num_query_tokens == AutoProcessor.from_pretrained(tmp_path / "hf2").num_query_tokens == 4
    captions = qformers.load(stage2.model).caption(pictures, "a photo", max_new_tokens=6)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf2")
    for picture, caption in zip(pictures, captions, strict=True):
        inputs = processor(images=torch.zeros(3, 28, 28), text="a photo", return_tensors="pt")
        inputs["pixel_values"] = ours.preprocess(picture)
        said = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(said, skip_special_tokens=True)[0].strip() == caption
