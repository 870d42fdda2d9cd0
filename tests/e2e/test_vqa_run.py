"""Question answering as a user runs it, at toy size: from a stage-1 run over training to scores and a submission."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import metric_rows, toy_config, write_toy_data

import qformers
from qformers.cli import main
from qformers.data.batch import IGNORED_LABEL
from qformers.data.config import SourceConfig
from qformers.errors import CheckpointError, ConfigError
from qformers.evaluation.answering import evaluate_vqa, rank_answers
from qformers.evaluation.captioning import Captioner
from qformers.models.config import GenerationSettings, LanguageConfig
from qformers.objectives.answers import AnswerObjective
from qformers.training.config import TrainConfig
from qformers.training.features import precompute
from qformers.training.loop import train
from qformers.training.setup import build_run

TEMPLATE = "a photo of {} runs"
ASKED = ["red cat", "the tree and the house", "blue", "green dog and red fish in the tree"]
ANSWERS = ["cat", "blue", "on the car", "green bird"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 pictures with two questions each, answered by ten people who do not agree."""
    folder = tmp_path_factory.mktemp("vqa")
    write_toy_data(folder)
    for family in ("gpt2", "t5"):
        toy_transformers_model(family).save_pretrained(folder / family)
        toy_tokenizer(folder / family, ends=family == "t5")
    rows = [
        {
            "image": f"{number // 2}.png",
            "question": ASKED[number % 4],
            "question_id": number,
            "answers": [ANSWERS[number % 4]] * 6 + [ANSWERS[(number + 1) % 4]] * 3 + ["dog"],
            "answer_type": ["yes/no", "other"][number % 2],
        }
        for number in range(32)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(toy_config(folder, folder / "stage1", steps=4, precision="fp32"))
    return folder


def vqa_config(data: Path, family: str, output: Path, **settings) -> TrainConfig:
    source = SourceConfig(path=str(data / "questions.jsonl"))
    language = LanguageConfig(path=str(data / family), qformer_reads="question", question_template=TEMPLATE)
    config = toy_config(data, output, precision="fp32", stage=2, start=str(data / "stage1"), task="vqa",
                        language=language)  # fmt: skip
    return replace(config, data=replace(config.data, train=[source], validation=[source]), **settings)


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def run(request, data) -> tuple[str, TrainConfig, Path]:
    config = vqa_config(data, request.param, data / f"run_{request.param}")
    return request.param, config, train(config).model


def test_training_lowers_the_loss_and_trains_the_text_branch(run, data):
    _, config, model = run
    rows = metric_rows(Path(config.output))
    # Of one drawn answer a question the training loss jumps; over all answers it falls.
    assert rows[11]["validation/lm"] < rows[5]["validation/lm"]
    assert {"answer_accuracy", "validation/lm", "token_accuracy"} <= rows[-1].keys()
    before = load_file(data / "stage1" / "model" / "model.safetensors")
    after = load_file(model / "model.safetensors")
    for name in ("qformer.text_embeddings.word.weight", "qformer.blocks.0.text_ffn.up.weight", "qformer.query_tokens"):
        assert not torch.equal(before[name], after[name]), name


def test_resumed_from_an_older_checkpoint_it_ends_with_the_same_weights(run, tmp_path):
    _, config, model = run
    again = replace(config, output=str(tmp_path / "run"))
    shutil.copytree(config.output, again.output)
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    for later in checkpoints[1:]:
        shutil.rmtree(later)
    resumed = load_file(train(again, resume="auto").model / "model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(tensor, resumed[name]), name


def test_weighted_answers_are_the_mean_over_all_who_answered(data, tmp_path):
    """A batch of ten equal rows, one for each person, has the loss of one row with weights."""
    from accelerate import Accelerator

    config = vqa_config(data, "gpt2", tmp_path / "weighted")
    config = replace(
        config,
        data=replace(config.data, answers_as="weighted", validation=[]),
        model=replace(config.model, dropout=0.0, attention_dropout=0.0),
    )
    run = build_run(config, None, Accelerator(cpu=True, mixed_precision="no"))
    objective = run.objective.eval()
    assert isinstance(objective, AnswerObjective)
    weighted = run.train_data.collate([run.train_data[0, 0], run.train_data[0, 3]])
    assert weighted.answers.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert weighted.answers.weights.tolist() == pytest.approx([0.6, 0.3, 0.1] * 2)
    drawing = replace(config, data=replace(config.data, answers_as="sampled"))
    sampled = build_run(drawing, None, Accelerator(cpu=True, mixed_precision="no")).train_data
    drawn = [sampled[epoch, 0].answers[0] for epoch in range(400)]
    shares = {}
    for _, labels, weight in drawn:
        assert weight == 1
        said = tuple(labels[labels != IGNORED_LABEL].tolist())
        shares[said] = shares.get(said, 0) + 1 / 400
    whole = weighted.answers
    for row, expected in zip(whole.labels[:3], (0.6, 0.3, 0.1), strict=True):
        assert shares[tuple(row[row != IGNORED_LABEL].tolist())] == pytest.approx(expected, abs=0.08)
    with torch.no_grad():
        loss = objective(weighted).losses["lm"]
        # Ten people by hand: every answer as often as it was given, each with weight one.
        people = torch.tensor([0] * 6 + [1] * 3 + [2] + [3] * 6 + [4] * 3 + [5])
        by_hand = replace(weighted, answers=replace(whole.map(lambda tensor: tensor[people]), weights=torch.ones(20)))
        torch.testing.assert_close(loss, objective(by_hand).losses["lm"], atol=1e-5, rtol=0)


def test_the_loss_of_a_question_does_not_depend_on_its_batch(data, tmp_path):
    from accelerate import Accelerator

    run = build_run(vqa_config(data, "gpt2", tmp_path), None, Accelerator(cpu=True, mixed_precision="no"))
    objective, questions = run.objective.eval(), run.validation_data
    rows = [0, 1, 2, 3]
    with torch.no_grad():
        alone = [objective(questions.collate([questions[0, row]])) for row in rows]
        batches = [questions.collate([questions[0, row]]) for row in rows]
        tokens = [(batch.answers.labels != IGNORED_LABEL).sum(1) for batch in batches]
        weights = [0.6, 0.3, 0.1]
        masses = [sum(w * n.item() for w, n in zip(weights, count, strict=True)) for count in tokens]
        expected = sum(m * result.losses["lm"].item() for m, result in zip(masses, alone, strict=True)) / sum(masses)
        together = objective(questions.collate([questions[0, row] for row in rows])).losses["lm"].item()
    assert together == pytest.approx(expected, abs=1e-5)


def test_micro_batches_have_the_loss_and_gradients_of_the_whole(data, tmp_path):
    from accelerate import Accelerator

    config = vqa_config(data, "gpt2", tmp_path)
    config = replace(config, data=replace(config.data, answers_as="weighted"))
    run = build_run(config, None, Accelerator(cpu=True, mixed_precision="no"))
    objective = run.objective.eval()
    batch = run.train_data.collate([run.train_data[0, row] for row in (0, 1, 2, 3, 5)])
    found = []
    for size in (None, 2):
        run.optimiser.zero_grad()
        passes = list(objective.passes([batch], size, lambda number: nullcontext()))
        for arguments in passes:
            (objective(*arguments).total / len(passes)).backward()
        found.append([weight.grad.clone() for weight in run.trained if weight.grad is not None])
    assert len(found[0]) > 20
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


def test_features_are_stored_once_a_picture_and_train_the_same(data, tmp_path):
    config = vqa_config(data, "gpt2", tmp_path / "with", steps=4)
    stored = replace(config, data=replace(config.data, features=str(tmp_path / "features"), feature_views=1))
    store = precompute(stored)
    assert len(store) == 16
    train(stored)
    assert metric_rows(tmp_path / "with")[-1]["loss/lm"] > 0


def test_evaluation_scores_by_type_and_writes_a_submission(run, data, tmp_path, capsys):
    _, config, model = run
    line = ["evaluate", "vqa", "--model", config.output, "--data", str(data / "questions.jsonl")]
    files = ["--json", str(tmp_path / "scores.json"), "--submission", str(tmp_path / "answers.json")]
    assert main([*line, *files, "--num_beams", "1"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["questions"] == 32 and scores["left_out"] == 0
    assert {"accuracy", "answer_type/yes/no", "answer_type/other"} <= scores.keys()
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [row["question_id"] for row in answers] == list(range(32))
    asked = [json.loads(row) for row in (data / "questions.jsonl").read_text().splitlines()]
    model = qformers.load(model)
    by_ask = model.ask([data / row["image"] for row in asked], [row["question"] for row in asked], num_beams=1,
                       length_penalty=-1.0)  # fmt: skip
    assert [row["answer"] for row in answers] == by_ask
    assert "accuracy" in capsys.readouterr().out


def test_a_question_that_stands_there_twice_is_asked_once(run, data, tmp_path, monkeypatch):
    _, _, model = run
    rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    doubled = [{**row, "question_id": f"{copy}-{row['question_id']}"} for copy in range(3) for row in rows]
    path = data / "doubled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in doubled))
    asked, answer = [], Captioner.answer
    monkeypatch.setattr(
        Captioner, "answer", lambda self, patches, questions, *rest: asked.extend(questions)
        or answer(self, patches, questions, *rest),
    )  # fmt: skip
    once, thrice = (
        evaluate_vqa(str(model), SourceConfig(path=str(file)), GenerationSettings(max_new_tokens=4))
        for file in (data / "questions.jsonl", path)
    )
    assert len(asked) == 64  # 32 of each file
    assert thrice.answers == once.answers * 3 and len(thrice.question_ids) == 96


def test_ranked_answers_are_the_likeliest_candidates(run, data, tmp_path):
    _, config, path = run
    model = qformers.load(path)
    speaker = model._speaker()
    patches = model.patches([data / f"{number}.png" for number in range(3)])
    scores = rank_answers(speaker, patches, ASKED[:3], ANSWERS)
    with torch.no_grad():
        for row in range(3):
            visual, prompts = speaker.question_inputs(patches[row : row + 1], [ASKED[row]])
            for column, answer in enumerate(ANSWERS):
                ids, labels = (tensor[None] for tensor in speaker.tokenizer.encode_answer(prompts[0], answer))
                mask = labels != IGNORED_LABEL
                logits = speaker.model.language_model(
                    visual, ids, torch.ones_like(ids, dtype=torch.bool), labels.masked_fill(~mask, 0), mask
                )
                expected = -torch.nn.functional.cross_entropy(logits, labels[mask], reduction="sum")
                torch.testing.assert_close(scores[row, column], expected, atol=1e-4, rtol=0)
    (tmp_path / "candidates.txt").write_text("\n".join(ANSWERS) + "\n")
    line = ["evaluate", "vqa", "--model", config.output, "--data", str(data / "questions.jsonl")]
    files = ["--candidates", str(tmp_path / "candidates.txt"), "--submission", str(tmp_path / "answers.json")]
    assert main([*line, *files]) == 0
    ranked = [row["answer"] for row in json.loads((tmp_path / "answers.json").read_text())]
    assert set(ranked) <= set(ANSWERS)
    assert ranked[0] == ANSWERS[int(rank_answers(speaker, patches[:1], ASKED[:1], ANSWERS).argmax())]


def test_unconditioned_it_trains_as_many_steps_and_keeps_its_text_branch(data, tmp_path):
    config = vqa_config(data, "gpt2", tmp_path, steps=4)
    blind = replace(config, language=replace(config.language, qformer_reads="nothing"))
    model = train(blind).model
    before = load_file(data / "stage1" / "model" / "model.safetensors")
    after = load_file(model / "model.safetensors")
    name = "qformer.text_embeddings.word.weight"
    assert torch.equal(before[name], after[name])
    with pytest.raises(CheckpointError, match="reads no text"):
        qformers.load(model).attention(data / "0.png", "red cat")


def test_reading_an_empty_text_it_trains_as_many_weights_and_knows_no_question(data, tmp_path):
    from accelerate import Accelerator

    config = vqa_config(data, "gpt2", tmp_path / "run", steps=4)
    control = replace(config, language=replace(config.language, qformer_reads="empty"))
    runs = [build_run(some, None, Accelerator(cpu=True, mixed_precision="no")) for some in (config, control)]
    assert [weight.shape for weight in runs[0].trained] == [weight.shape for weight in runs[1].trained]
    assert runs[0].train_data[0, 0].question_ids.shape > (2,)
    assert runs[1].train_data[0, 0].question_ids.tolist() == [runs[1].tokenizer.cls_id, runs[1].tokenizer.sep_id]

    model = qformers.load(train(control).model)
    before = load_file(data / "stage1" / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    name = "qformer.blocks.0.text_ffn.up.weight"
    assert not torch.equal(before[name], after[name])
    patches = model.patches([data / "0.png"] * 2)
    visual, prompts = model._speaker().question_inputs(patches, ASKED[:2])
    assert torch.equal(visual[0], visual[1]) and prompts[0] != prompts[1]


def test_a_wrong_combination_is_said_in_one_line(run, data, tmp_path):
    _, config, model = run
    with pytest.raises(ConfigError, match="task vqa belongs to stage 2"):
        replace(config, stage=1, language=LanguageConfig())
    with pytest.raises(ConfigError, match="qformer_reads is question and task is captioning"):
        replace(config, task="captioning")
    captions = SourceConfig(path=str(data / "pairs.jsonl"))
    on = replace(config, task="captioning", language=LanguageConfig(), start=str(model), output=str(tmp_path / "on"),
                 data=replace(config.data, train=[captions], validation=[]))  # fmt: skip
    with pytest.raises(ConfigError, match="its Q-Former reads instructions"):
        train(on)
