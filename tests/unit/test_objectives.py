"""The objectives alone: which negatives are drawn, what the targets are, and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import objective, random_batch, tiny_stage1

from qformers.data.batch import IGNORED_LABEL
from qformers.errors import ConfigError
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itc import (
    itc_loss,
    max_over_queries,
    own_caption_matrix,
    same_image_matrix,
    similarities,
)
from qformers.objectives.itm import HardNegatives, itm_labels, itm_logits, itm_loss, sample_hard_negatives
from qformers.objectives.stage1 import Stage1Objective, query_diversity

ONE = torch.tensor(1.0)


def test_similarity_is_the_best_query_s():
    image_features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]])
    text_features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    expected = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, -0.6]])
    torch.testing.assert_close(max_over_queries(image_features, text_features), expected)
    sim_i2t, sim_t2i = similarities(image_features, text_features[:2])
    torch.testing.assert_close(sim_i2t, expected[:, :2])
    torch.testing.assert_close(sim_t2i, expected[:, :2].T)


def test_itc_worked_by_hand():
    """Two pairs: each row is softmax(1, 0) or softmax(0, 1 / 2) at temperature 1 / 2."""
    sim_i2t = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    first, second = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-0.5))
    own = torch.eye(2, dtype=torch.bool)
    half = torch.tensor(0.5)
    loss = itc_loss(sim_i2t, sim_i2t.T, half, own, label_smoothing=0.0)
    torch.testing.assert_close(loss.item(), (first + second) / 2)
    # Smoothing 0.1 over 2 classes moves 0.05 of the target to the wrong one, 1 and 0.5 further down.
    smoothed = itc_loss(sim_i2t, sim_i2t.T, half, own, label_smoothing=0.1)
    torch.testing.assert_close(smoothed.item(), (first + 0.05 + second + 0.025) / 2)


def test_captions_of_one_image_share_its_target():
    image_ids = torch.tensor([7, 3, 7])
    same = same_image_matrix(image_ids)
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert torch.equal(own_caption_matrix(image_ids), torch.eye(3, dtype=torch.bool))
    log_half, other = -math.log(0.5), 20.0
    sims = torch.tensor([[0.0, -other, 0.0], [-other, 0.0, -other], [0.0, -other, 0.0]])
    shared = itc_loss(sims, sims.T, ONE, same, label_smoothing=0.0)
    torch.testing.assert_close(shared.item(), 2 / 3 * log_half, atol=1e-6, rtol=0)
    # A model that cannot tell the two captions apart pays the same for naming both as for naming one ...
    alone = itc_loss(sims, sims.T, ONE, own_caption_matrix(image_ids), label_smoothing=0.0)
    torch.testing.assert_close(alone, shared)
    # ... but with ids it is punished for preferring one of them, without ids for not doing so.
    sims[0, 0] = sims[2, 2] = 5.0
    assert itc_loss(sims, sims.T, ONE, same, 0.0) > shared
    assert itc_loss(sims, sims.T, ONE, own_caption_matrix(image_ids), 0.0) < alone


def test_hard_negatives_follow_the_softmax_and_avoid_the_same_image():
    """Draws of 6,000 independent rows against the softmax over what is allowed, by Pearson's chi-square."""
    torch.manual_seed(0)
    image_ids = torch.tensor([0, 1, 0, 2, 3])
    positives = same_image_matrix(image_ids)
    sim_i2t, sim_t2i = torch.randn(5, 5), torch.randn(5, 5)
    temperature, draws = torch.tensor(0.7), 6000
    drawn = [sample_hard_negatives(sim_i2t, sim_t2i, temperature, positives, torch.rand(2, 5)) for _ in range(draws)]
    for similarity, rows in (
        (sim_t2i, torch.stack([negatives.images for negatives in drawn])),
        (sim_i2t, torch.stack([negatives.texts for negatives in drawn])),
    ):
        for row in range(5):
            allowed = [column for column in range(5) if image_ids[column] != image_ids[row]]
            counts = torch.bincount(rows[:, row], minlength=5)
            assert counts[allowed].sum() == draws, "a caption of the same image was drawn as a negative"
            expected = draws * (similarity[row, allowed] / temperature).softmax(dim=0)
            chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
            assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001
    assert all(negatives.image_exists.all() and negatives.text_exists.all() for negatives in drawn)


def test_a_part_of_the_negatives_is_drawn_evenly():
    """Pearson's chi-square against the mixture; the hardest negative alone would be drawn with probability 1."""
    torch.manual_seed(0)
    positives, draws = torch.eye(5, dtype=torch.bool), 4000
    similarity = torch.tensor([[0.0, 9.0, 1.0, 2.0, 3.0]]).expand(5, 5)
    drawn = [
        sample_hard_negatives(similarity, similarity, ONE, positives, torch.rand(2, 5), 0.4).texts[0]
        for _ in range(draws)
    ]
    counts = torch.bincount(torch.stack(drawn), minlength=5)
    assert counts[0] == 0
    expected = draws * (0.4 * similarity[0, 1:].softmax(dim=0) + 0.6 / 4)
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", ["hard_negative_fraction", "itm_fraction", "label_smoothing"])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_0_to_1_is_refused(name, share):
    with pytest.raises(ConfigError, match=rf"objectives.{name} is {share}: must be between 0 and 1"):
        Stage1LossConfig(**{name: share})


@pytest.mark.parametrize("image_ids", [[4], [4, 4, 4], [4, 4, 4, 9]])
def test_rows_without_a_negative_are_left_out(image_ids):
    positives = same_image_matrix(torch.tensor(image_ids))
    rows = len(image_ids)
    negatives = sample_hard_negatives(
        torch.randn(rows, rows), torch.randn(rows, rows), ONE, positives, torch.rand(2, rows)
    )
    exists = [len(set(image_ids)) > 1] * rows
    assert negatives.image_exists.tolist() == negatives.text_exists.tolist() == exists
    if not all(exists):
        assert negatives.images.tolist() == list(range(rows)), "an index that is safe to gather"
    wanted = [1] * rows + [0 if one else IGNORED_LABEL for one in exists] * 2
    assert itm_labels(negatives).tolist() == wanted


def test_the_objective_draws_with_the_image_ids_it_is_told_to_use():
    """A batch of one image has no negatives with ids; without, the image's other captions are negatives."""
    model, batch = tiny_stage1(), random_batch([4, 5, 6], [0, 0, 0])
    itself, nowhere = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    positives_only = objective(model)(batch, HardNegatives(itself, itself, nowhere, nowhere)).losses["itm"]
    torch.testing.assert_close(objective(model)(batch).losses["itm"], positives_only)
    without_ids = objective(model, use_image_ids=False)(batch).losses["itm"]
    assert (without_ids - positives_only).abs() > 1e-3


def test_itm_of_a_part_of_the_batch_is_itm_of_its_first_rows():
    model, batch = tiny_stage1(), random_batch([4, 5, 6, 3])
    everywhere = torch.ones(4, dtype=torch.bool)
    negatives = HardNegatives(torch.tensor([3, 2, 1, 0]), torch.tensor([1, 3, 0, 2]), everywhere, everywhere)
    packed = model.packed_pass(batch.patch_embeds, batch.input_ids, batch.attention_mask)
    memory, texts = packed.image.memory, (batch.input_ids, batch.attention_mask)

    def logits(scored):
        images, texts_of_images = negatives.images[:scored], negatives.texts[:scored]
        own, wrong = (tuple(part[rows] for part in texts) for rows in (slice(scored), texts_of_images))
        return itm_logits(model, memory.first(scored), own, memory.select(images), wrong)

    whole, part = logits(4), logits(2)
    torch.testing.assert_close(part, whole[[0, 1, 4, 5, 8, 9]])
    model.temperature.data.fill_(1e-5)  # its draws are then certain
    output = Stage1Objective(model, Stage1LossConfig(itm_fraction=0.5))(batch)
    full = Stage1Objective(model, Stage1LossConfig())(batch)
    assert not torch.isclose(output.losses["itm"], full.losses["itm"])
    torch.testing.assert_close(output.losses["itc"], full.losses["itc"])


def test_near_temperature_zero_the_objective_draws_the_hardest():
    """So its draw is known: a text's most similar other image, an image's most similar other text."""
    model, batch = tiny_stage1(), random_batch([4, 5, 6, 3])
    model.temperature.data.fill_(1e-5)
    packed = model.packed_pass(batch.patch_embeds, batch.input_ids, batch.attention_mask)
    similarity = max_over_queries(packed.image.image_features, packed.text_features)
    similarity = similarity.masked_fill(torch.eye(4, dtype=torch.bool), -2)
    everywhere = torch.ones(4, dtype=torch.bool)
    hardest = HardNegatives(similarity.argmax(dim=0), similarity.argmax(dim=1), everywhere, everywhere)
    assert not torch.equal(hardest.images, hardest.texts), "mixing the two up would not be seen"
    expected = objective(model)(batch, hardest).losses["itm"]
    torch.testing.assert_close(objective(model)(batch).losses["itm"], expected)


def test_itm_is_cross_entropy_over_the_pairs_that_exist():
    here, nowhere = torch.tensor([True, True]), torch.tensor([False, True])
    itself = torch.arange(2)
    labels = itm_labels(HardNegatives(itself, itself, here, nowhere))
    assert labels.tolist() == [1, 1, 0, 0, IGNORED_LABEL, 0]
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 0.0], [3.0, 0.0], [0.0, 99.0], [0.0, 0.0]])
    terms = [math.log(1 + math.exp(-margin)) for margin in (1, 2, 0, 3, 0)]
    torch.testing.assert_close(itm_loss(logits, labels).item(), sum(terms) / 5)


def test_a_loss_that_is_not_finite_reaches_the_caller():
    """Drawing negatives from NaN similarities would end in an error of its own, or kill the GPU's context."""
    model = tiny_stage1()
    with torch.no_grad():
        model.text_projection.weight.fill_(math.nan)
    output = objective(model)(random_batch([4, 5, 6]))
    assert output.losses["itc"].isnan()
    assert output.losses["itg"].isfinite()


def test_temperature_is_kept_from_crossing_zero():
    model = tiny_stage1()
    for least, value, kept in ((0.01, -0.04, 0.01), (0.01, 0.5, 0.5), (0.1, 0.07, 0.1)):
        model.temperature.data.fill_(value)
        Stage1Objective(model, Stage1LossConfig(min_temperature=least)).after_step()
        assert model.temperature.item() == pytest.approx(kept)
    with pytest.raises(ConfigError, match=r"min_temperature is 0.0: similarities are divided by it"):
        Stage1LossConfig(min_temperature=0.0)


def test_itc_alone_is_the_same_itc_and_lasts_as_long_as_it_is_asked_to():
    model, batch = tiny_stage1(), random_batch([4, 5, 6])
    step = Stage1Objective(model, Stage1LossConfig(itc_steps=2)).train()
    whole = objective(model)(batch)
    for number, names in ((1, {"itc"}), (2, {"itc"}), (3, {"itc", "itm", "itg"})):
        step.before_step(number, seed=0)
        output = step(batch)
        assert output.losses.keys() == names
        torch.testing.assert_close(output.losses["itc"], whole.losses["itc"])
    step.before_step(1, seed=0)
    assert step.eval()(batch).losses.keys() == {"itc", "itm", "itg"}, "validation measures all three"
    with pytest.raises(ConfigError, match="itc_steps is -1"):
        Stage1LossConfig(itc_steps=-1)


def test_stats_count_what_was_right():
    output = objective(tiny_stage1())(random_batch([4, 5, 6], [0, 1, 0]))
    assert output.stats["temperature"] == pytest.approx(0.07)
    assert 0 <= output.stats["itm_accuracy"] <= 1
    assert output.stats["itc_accuracy"].item() * 3 == pytest.approx(round(output.stats["itc_accuracy"].item() * 3))
    assert not any(value.requires_grad for value in output.stats.values())


def test_queries_that_say_the_same_have_no_diversity():
    alone = torch.randn(3, 1, 8)
    assert query_diversity(alone.expand(3, 4, 8)) == pytest.approx(0.0, abs=1e-12)
    opposite = torch.cat([alone, -alone], dim=1)
    assert query_diversity(opposite) == pytest.approx(1.0)
    model, batch = tiny_stage1(), random_batch([4, 5, 6])
    apart = objective(model)(batch).stats["query_diversity"]
    model.qformer.query_tokens.data[:] = model.qformer.query_tokens.data[0]
    assert apart > 0.01 and objective(model)(batch).stats["query_diversity"] < 1e-6


def test_half_precision_runs_and_keeps_features_and_logits_in_fp32():
    model, batch = tiny_stage1().eval(), random_batch([4, 5, 6])
    exact = model.packed_pass(batch.patch_embeds, batch.input_ids, batch.attention_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = objective(model)(batch)
        sim_i2t, _ = similarities(exact.image.image_features, exact.text_features)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in cast.losses.values())
    expected, _ = similarities(exact.image.image_features, exact.text_features)
    torch.testing.assert_close(sim_i2t, expected, msg="similarities are divided by the temperature: bf16 is too coarse")
    half = model.bfloat16()
    image = half.encode_image(batch.patch_embeds)
    text_features = half.encode_text(batch.input_ids, batch.attention_mask)
    assert image.image_features.dtype == text_features.dtype == torch.float32
    torch.testing.assert_close(image.image_features, exact.image.image_features, atol=0.1, rtol=0)
    torch.testing.assert_close(text_features, exact.text_features, atol=0.1, rtol=0)


def test_without_itg_its_work_is_not_done_and_the_other_losses_are_the_same(monkeypatch):
    model, batch = tiny_stage1().double(), random_batch([5, 3, 6, 4])
    negatives = HardNegatives(
        torch.arange(len(batch)).roll(1),
        torch.arange(len(batch)).roll(-1),
        *(torch.ones(len(batch), dtype=torch.bool) for _ in range(2)),
    )
    whole = objective(model)(batch, negatives)
    for name in ("packed_pass", "token_logits", "with_dec"):
        monkeypatch.setattr(model, name, lambda *_, name=name: pytest.fail(f"{name} is ITG's work"))
    without = Stage1Objective(model, Stage1LossConfig(itg=False))
    found = without(batch, negatives)
    assert list(found.losses) == ["itc", "itm"]
    for name, loss in found.losses.items():
        torch.testing.assert_close(loss, whole.losses[name], atol=1e-5, rtol=0)
    model.zero_grad()
    found.total.backward()
    assert all(weight.grad is None for weight in model.itg_head.parameters())
    alone = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    monkeypatch.undo()
    kept = objective(model)(batch, negatives).losses
    (kept["itc"] + kept["itm"]).backward()
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)
    assert without(batch).losses["itm"].isfinite()  # draws its own negatives too
