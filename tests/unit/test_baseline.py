from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from qformers.demo.baseline import (
    RetrievalSet,
    embed_sentences,
    fit_best_ridge,
    fit_ridge,
    pool_patches,
    ridge_similarities,
    solve_ridge,
)
from qformers.errors import DataError
from qformers.evaluation.retrieval import retrieval_metrics

PENALTIES = [1e-3, 0.3, 20.0]


@pytest.mark.parametrize(("images", "dim"), [(40, 7), (7, 40), (9, 9), (1, 3)])
def test_the_closed_form_equals_least_squares_on_the_augmented_system(images, dim):
    rng = np.random.default_rng(images)
    features, targets = rng.standard_normal((images, dim)), rng.standard_normal((images, 5))
    solutions = solve_ridge(torch.tensor(features), torch.tensor(targets), PENALTIES)
    for penalty, solution in zip(PENALTIES, solutions, strict=True):
        augmented = np.vstack([features, np.sqrt(penalty * images) * np.eye(dim)])
        expected = np.linalg.lstsq(augmented, np.vstack([targets, np.zeros((dim, 5))]), rcond=None)[0]
        np.testing.assert_allclose(solution.numpy(), expected, atol=1e-10)


def linear_world(images: int, seed: int, noise: float, texts_per_image: int = 2) -> RetrievalSet:
    """Images and texts that are two noisy linear views of the same concept."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    concepts = rng.standard_normal((images, 6))
    to_image, to_text = shared.standard_normal((6, 20)), shared.standard_normal((6, 8))
    owners = np.repeat(np.arange(images), texts_per_image)
    features = 5 + concepts @ to_image + noise * rng.standard_normal((images, 20))
    texts = concepts[owners] @ to_text + noise * rng.standard_normal((len(owners), 8)) + 3
    return RetrievalSet(
        torch.tensor(features).float(),
        torch.nn.functional.normalize(torch.tensor(texts).float(), dim=1),
        torch.tensor(owners),
    )


def test_a_linear_relation_is_found_and_generalises():
    ridge = fit_ridge(linear_world(200, 0, 0.1), linear_world(40, 1, 0.1))
    held_out = linear_world(40, 2, 0.1)
    similarities = ridge_similarities(ridge, held_out.image_features, held_out.text_embeds)
    metrics = retrieval_metrics(similarities, held_out.text_to_image)
    assert metrics["i2t_r1"] > 0.8 and metrics["t2i_r1"] > 0.8
    assert ridge.validation["i2t_r1"] > 0.8


def test_the_choice_is_the_best_of_the_grid_and_is_refitted_on_both_parts():
    train, validation = linear_world(60, 3, 1.0), linear_world(50, 4, 1.0)
    chosen = fit_ridge(train, validation, PENALTIES)
    alone = [fit_ridge(train, validation, [penalty]).validation for penalty in PENALTIES]
    score = lambda metrics: metrics["i2t_r1"] + metrics["t2i_r1"]  # noqa: E731
    assert score(chosen.validation) == max(map(score, alone))
    assert chosen.penalty in PENALTIES
    both = torch.cat([train.image_features, validation.image_features]).double()
    torch.testing.assert_close(chosen.feature_mean, both.mean(dim=0))
    standardised = (both - chosen.feature_mean) / chosen.feature_scale
    targets = torch.cat([train.targets(), validation.targets()])
    (weight,) = solve_ridge(standardised, targets - targets.mean(dim=0), [chosen.penalty])
    torch.testing.assert_close(chosen.weight, weight)


def test_the_part_to_learn_from_is_chosen_on_the_validation_part():
    good, validation = linear_world(60, 3, 0.3), linear_world(50, 4, 0.3)
    shuffled = replace(linear_world(90, 5, 0.3), text_to_image=linear_world(90, 5, 0.3).text_to_image.flip(0))
    mixed = good.joined(shuffled)
    best = fit_best_ridge([mixed, mixed.subset(torch.arange(150) < 60), shuffled], validation)
    torch.testing.assert_close(best.weight, fit_ridge(good, validation).weight)
    assert best.validation_score > fit_ridge(mixed, validation).validation_score


def test_a_subset_keeps_the_texts_of_its_images():
    part = linear_world(5, 8, 0.1)
    keep = torch.tensor([False, True, False, True, True])
    smaller = part.subset(keep)
    torch.testing.assert_close(smaller.targets(), part.targets()[keep])
    assert torch.equal(smaller.image_features, part.image_features[keep])


@pytest.mark.parametrize("centred", [True, False])
def test_similarities_are_cosines_of_the_predictions(centred):
    part = linear_world(30, 5, 0.5)
    ridge = fit_ridge(part, linear_world(20, 6, 0.5))
    ridge = replace(ridge, centred=centred)
    standardised = (part.image_features - ridge.feature_mean) / ridge.feature_scale
    predicted = standardised.double() @ ridge.weight + ridge.text_mean
    shift = ridge.text_mean if centred else torch.zeros(8)
    expected = 1 - cdist((predicted - shift).numpy(), (part.text_embeds - shift).numpy(), "cosine")
    actual = ridge_similarities(ridge, part.image_features, part.text_embeds)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


def test_an_image_without_a_text_is_an_error_and_a_constant_feature_is_not():
    part = linear_world(10, 7, 0.5)
    with pytest.raises(DataError, match="1 of 11"):
        RetrievalSet(torch.zeros(11, 20), part.text_embeds, part.text_to_image).targets()
    part.image_features[:, 3] = 1.0
    ridge = fit_ridge(part, part)
    assert torch.isfinite(ridge_similarities(ridge, part.image_features, part.text_embeds)).all()


def test_pooling_puts_the_first_token_beside_the_mean_of_the_others():
    pooled = pool_patches(torch.tensor([[[1.0, 2.0], [4.0, 6.0], [6.0, 8.0]]]).bfloat16())
    assert pooled.tolist() == [[1.0, 2.0, 5.0, 7.0]]


def test_sentence_embeddings_ignore_padding_and_keep_the_order(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "on", "mat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab={word: row for row, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(words), **size)).eval()
    model.save_pretrained(tmp_path)
    texts = ["a cat on a mat", "cat", "a mat"]
    together = embed_sentences(texts, tmp_path, batch_size=2)
    for row, text in enumerate(texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(dim=0) / states.mean(dim=0).norm()
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-5)
