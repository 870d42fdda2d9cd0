"""`model.ask` and `qformers ask`: the question steers the Q-Former and is put to the language model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_blip2 import KINDS, save_toy
from toy_language import END, PAD
from toy_run import write_toy_data

import qformers
from qformers.cli import main
from qformers.convert.run import convert
from qformers.errors import CheckpointError, ConfigError, DataError
from qformers.models.config import GenerationSettings, LanguageConfig
from qformers.models.saving import INSTRUCTBLIP_TEMPLATE, SavedLanguage, load_model, save_model

QUESTIONS = ["red square", "the picture of a dark blue line", "circle", "a white white white white square of line"]
INSTRUCTED = ["instruct_llama", "instruct_t5"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    write_toy_data(folder)
    return [folder / f"{number}.png" for number in range(4)]


@pytest.fixture(scope="module", params=INSTRUCTED)
def source(request, tmp_path_factory) -> Path:
    """InstructBLIP as transformers writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_toy(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def vqa(source, tmp_path_factory) -> Path:
    """The same weights as a model of the paper's VQA: the Q-Former reads the question alone."""
    folder = tmp_path_factory.mktemp("vqa") / "model"
    found = qformers.load(source)
    language = LanguageConfig(path="toy", qformer_reads="question", question_template="a photo of {} runs")
    saved = SavedLanguage(language, found._speaker().tokenizer)
    save_model(found.model, found.loaded.config, found.tokenizer, folder, saved)
    return folder


def test_instructblip_answers_as_in_transformers(source, pictures):
    """The filled template goes to both tokenizers, beams and length penalty as the paper's VQA."""
    model = qformers.load(source)
    kind = next(kind for kind in INSTRUCTED if kind in str(source))
    theirs = save_toy(kind, source)
    answers = model.ask(pictures, QUESTIONS)
    settings = GenerationSettings.for_answers()
    assert (settings.num_beams, settings.length_penalty) == (5, -1.0)
    speaker = model._speaker()
    for picture, question, answer in zip(pictures, QUESTIONS, answers, strict=True):
        prompt = INSTRUCTBLIP_TEMPLATE.replace("{}", question)
        ids, _ = speaker.tokenizer.encode_prompts([prompt])
        read, read_mask = model.tokenizer.encode([prompt])
        with torch.no_grad():
            visual = theirs.get_image_features(
                model.preprocess(picture),
                qformer_input_ids=read,
                qformer_attention_mask=read_mask.long(),
                return_dict=True,
            ).pooler_output
            embeds = torch.cat([visual, theirs.get_input_embeddings()(ids)], dim=1)
            said = theirs.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=settings.max_new_tokens,
                min_new_tokens=settings.min_new_tokens,
                num_beams=5,
                length_penalty=-1.0,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=PAD,
            )
        said = said[:, 1:] if KINDS[kind][1] == "t5" else said
        assert speaker.tokenizer.decode(said) == [answer]
    assert len(set(answers)) > 1, "all answers are one: the test sees nothing"


@pytest.mark.parametrize("generation", [{}, {"num_beams": 2, "length_penalty": 0.5}])
def test_an_answer_does_not_depend_on_what_is_asked_beside_it(vqa, pictures, generation):
    model = qformers.load(vqa)
    alone = [
        model.ask(picture, question, **generation)[0] for picture, question in zip(pictures, QUESTIONS, strict=True)
    ]
    assert len(set(alone)) > 1
    assert model.ask(pictures, QUESTIONS, **generation) == alone
    for order in ([3, 0], [2, 1, 3], [1, 3, 3, 0, 2, 1] * 8):
        asked = model.ask([pictures[n] for n in order], [QUESTIONS[n] for n in order], **generation)
        assert asked == [alone[n] for n in order]


def test_the_question_reaches_the_queries_without_the_template(vqa, pictures):
    model = qformers.load(vqa)
    speaker = model._speaker()
    patches = model.patches(pictures[:2])
    read = []
    visual_prompts = model.model.visual_prompts
    model.model.visual_prompts = lambda patches, text: read.append(text[0].tolist()) or visual_prompts(patches, text)
    answers = speaker.answer(patches, QUESTIONS[:2], GenerationSettings.for_answers())
    assert read == [speaker.instructions.encode(QUESTIONS[:2])[0].tolist()]
    model.model.visual_prompts = visual_prompts
    asked = [f"a photo of {text} runs" for text in QUESTIONS[:2]]
    by_hand = speaker.say(patches, asked, GenerationSettings.for_answers(), instructions=QUESTIONS[:2])
    assert answers == by_hand == model.ask(pictures[:2], QUESTIONS[:2])
    # What the queries read changes what they give the language model, not only its prompt.
    with torch.no_grad():
        one, other = (speaker.visual_prompts(patches[:1], [question]) for question in QUESTIONS[:2])
    assert not torch.allclose(one, other, atol=1e-2)


def test_one_picture_many_questions_and_one_question_many_pictures(vqa, pictures):
    model = qformers.load(vqa)
    assert model.ask(pictures[0], QUESTIONS) == model.ask([pictures[0]] * 4, QUESTIONS)
    assert model.ask(pictures, QUESTIONS[0]) == model.ask(pictures, [QUESTIONS[0]] * 4)
    assert len(model.ask(pictures[:2], QUESTIONS[0], num_return_sequences=3)) == 6
    assert len(model.ask(pictures[0], QUESTIONS[0], top_p=0.9)) == 1


def test_an_answer_in_pieces_is_the_greedy_one(vqa, pictures):
    model = qformers.load(vqa)
    greedy = {"num_beams": 1, "length_penalty": 1.0}
    for picture, question in zip(pictures, QUESTIONS, strict=True):
        pieces = list(model.stream_answer(picture, question))
        assert len(pieces) > 1 and "".join(pieces).strip() == model.ask(picture, question, **greedy)[0]
    with pytest.raises(ConfigError, match="streamed"):
        next(model.stream_answer(pictures[0], QUESTIONS[0], num_beams=2))
    with pytest.raises(DataError, match="question 1 of 1 is empty"):
        model.stream_answer(pictures[0], " ")


def test_saved_and_converted_it_still_reads_the_question(vqa, pictures, tmp_path):
    model = qformers.load(vqa)
    model.save_pretrained(tmp_path / "copy")
    convert(vqa, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "qformers")
    for name in ("copy", "hf", "back"):
        again = qformers.load(tmp_path / name)
        assert again.loaded.stage2()[1].qformer_reads == "question", name
        assert again.ask(pictures, QUESTIONS) == model.ask(pictures, QUESTIONS), name


def test_instructblip_as_the_first_versions_saved_it(source, tmp_path):
    convert(source, tmp_path / "old", "qformers")
    path = tmp_path / "old" / "config.json"
    description = json.loads(path.read_text())
    for name in ("qformer_reads", "question_template"):
        del description["language"][name]
    description["language"]["reads_instructions"] = True
    path.write_text(json.dumps(description))
    model, language = load_model(tmp_path / "old").stage2()
    assert model.reads_instructions and language.qformer_reads == "prompt"
    assert language.question_template == INSTRUCTBLIP_TEMPLATE


def test_attention_follows_the_question(vqa, pictures, tmp_path):
    model = qformers.load(vqa)
    one, other = (model.attention(pictures[0], question) for question in QUESTIONS[:2])
    assert one.shape == (1, 4, 2, 2) and not torch.allclose(one, other)
    line = ["inspect", str(pictures[0]), "--text", QUESTIONS[0], "--model", str(vqa), "--output"]
    assert main([*line, str(tmp_path / "looks.png")]) == 0
    with Image.open(tmp_path / "looks.png") as drawn:
        assert drawn.width > 500


def test_ask_command(vqa, pictures, capsys):
    line = ["ask", str(pictures[0]), *QUESTIONS[:2], "--model", str(vqa)]
    assert main([*line, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    model = qformers.load(vqa)
    assert [row["answers"] for row in said] == [[answer] for answer in model.ask(pictures[0], QUESTIONS[:2])]
    assert main(line) == 0
    assert [row.split("\t")[0] for row in capsys.readouterr().out.splitlines()] == QUESTIONS[:2]


def test_bad_input_gets_one_line(vqa, pictures, tmp_path, capsys):
    model = qformers.load(vqa)
    with pytest.raises(DataError, match="question 2 of 2 is empty: ask something"):
        model.ask(pictures[0], ["a", " "])
    with pytest.raises(DataError, match="0 pictures and 1 questions"):
        model.ask([], "a")
    with pytest.raises(DataError, match="4 pictures and 3 questions"):
        model.ask(pictures, QUESTIONS[:3])
    with pytest.raises(DataError, match=r"none\.png"):
        model.ask(tmp_path / "none.png", "a")
    with pytest.raises(DataError, match="the limit is 512"):
        model.ask(pictures[0], "a " * 600)
    with pytest.raises(ConfigError, match="has 0 places"):
        model.ask(np.zeros((9, 9, 3), np.uint8), "a", template="what is it?")
    assert main(["ask", str(pictures[0]), "", "--model", str(vqa)]) == 1
    assert "question 1 of 1 is empty" in capsys.readouterr().err


def test_a_model_that_reads_nothing_says_so_of_a_text_to_look_for(pictures, tmp_path):
    save_toy("opt", tmp_path)
    model = qformers.load(tmp_path)
    assert len(model.ask(pictures[:2], QUESTIONS[:2])) == 2  # its language model is asked all the same
    with pytest.raises(CheckpointError, match="its Q-Former reads no text"):
        model.attention(pictures[0], "a red square")
