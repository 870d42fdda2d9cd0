"""Sampling by given numbers: Hugging Face's nucleus, its probabilities, and the same answer in any batch."""

from __future__ import annotations

import pytest
import torch
from toy_language import toy_language_model, toy_prompts
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from qformers.models.config import GenerationSettings
from qformers.models.sampling import DrawnSampling, draws_for

GRID = 4096


@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.3, 1.0), (1.0, 0.7), (0.95, 2.0), (1e-6, 1.0)])
@pytest.mark.parametrize("spread", [3.0, 0.1])  # 0.1: a nucleus of hundreds of tokens, more than are looked at first
def test_tokens_come_as_often_as_hugging_face_s_nucleus_has_them(top_p, temperature, spread):
    scores = spread * torch.randn(1, 700, generator=torch.Generator().manual_seed(0))
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores))
    expected = warped.double().softmax(dim=-1)[0]
    draws = (torch.arange(GRID) / GRID)[:, None]  # every 4096th of the interval once
    chosen = DrawnSampling(draws, top_p, temperature)(torch.zeros(GRID, 1).long(), scores.expand(GRID, -1))
    assert (chosen.isfinite().sum(dim=-1) == 1).all()
    found = torch.bincount(chosen.argmax(dim=-1), minlength=700) / GRID
    assert not found[expected == 0].any()
    torch.testing.assert_close(found.double(), expected, atol=1.01 / GRID, rtol=0)


def test_the_largest_draw_chooses_a_token_that_can_be():
    scores = torch.tensor([[0.0, -torch.inf, -1.0, -torch.inf]])
    largest = torch.nextafter(torch.tensor([[1.0]]), torch.tensor(0.0))
    assert DrawnSampling(largest, 1.0)(torch.zeros(1, 1).long(), scores).argmax().item() == 2


def test_draws_are_of_the_name_and_the_seed():
    draws = draws_for(["a", "b", "a"], 0, 2, 5)
    assert draws.shape == (3, 2, 5) and torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    assert torch.equal(draws_for(["b"], 0, 2, 5)[0], draws[1])
    assert not torch.equal(draws_for(["b"], 1, 2, 5)[0], draws[1])
    assert draws_for([], 0, 2, 5).shape == (0, 2, 5)
    assert draws.min() >= 0 and draws.max() < 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "t5", "bart"])
def test_an_answer_is_the_same_alone_in_a_batch_and_in_another_order(family):
    model = toy_language_model(family)
    settings = GenerationSettings(max_new_tokens=9, top_p=0.9, num_return_sequences=3)
    visual = torch.randn(4, 4, model.dim, generator=torch.Generator().manual_seed(1))
    ids, mask = toy_prompts([[4], [5, 6, 7], [8, 9], [4, 5]])
    draws = draws_for(["one", "two", "three", "four"], 0, 3, 9)

    def said(rows: list[int]) -> list[list[list[int]]]:
        answers = model.generate(visual[rows], ids[rows], mask[rows], settings, draws=draws[rows])
        padded = torch.full((len(rows) * 3, 9), model.pad_id)
        padded[:, : answers.shape[1]] = answers
        return padded.unflatten(0, (len(rows), 3)).tolist()

    together = said([0, 1, 2, 3])
    assert len({str(answer) for of_row in together for answer in of_row}) > 6  # they are sampled
    assert said([3, 1, 0, 2]) == [together[row] for row in (3, 1, 0, 2)]
    assert [said([row])[0] for row in range(4)] == together
    torch.manual_seed(17)
    assert said([0, 1, 2, 3]) == together  # torch's own random state has no part in it


def test_limits_and_penalties_hold_for_drawn_answers_too():
    model = toy_language_model("gpt2")
    settings = GenerationSettings(
        max_new_tokens=12, min_new_tokens=12, top_p=1e-6, num_return_sequences=2, repetition_penalty=50.0
    )
    ids, mask = toy_prompts([[4]])
    said = model.generate(torch.randn(1, 4, model.dim), ids, mask, settings, draws=draws_for(["x"], 0, 2, 12))
    assert said.shape == (2, 12) and all(len(set(row)) == 12 for row in said.tolist())
