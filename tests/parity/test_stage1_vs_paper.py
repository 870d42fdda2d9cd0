"""The three losses and every gradient against the slow reference, in double precision."""

from __future__ import annotations

import pytest
import torch
from helpers import objective, random_batch, tiny_stage1
from reference_stage1 import PaperStage1, allowed

from qformers.models import masks
from qformers.objectives.itm import HardNegatives

# lengths, image ids, each text's negative image, each image's negative text
RAGGED = ([6, 3, 9, 4], [0, 1, 2, 3], [2, 3, 1, 0], [1, 0, 3, 1])
SHARED_IMAGES = ([5, 7, 3, 6], [0, 1, 0, 2], [1, 3, 1, 2], [3, 0, 1, 0])
ONE_ROW = ([5], [0], [None], [None])
ONE_IMAGE = ([4, 6, 3], [0, 0, 0], [None] * 3, [None] * 3)
ONE_ROW_WITHOUT_NEGATIVES = ([4, 6, 3, 3], [0, 1, 2, 3], [1, None, 0, 0], [None, 2, 0, 0])
CASES = {
    "ragged": RAGGED,
    "shared_images": SHARED_IMAGES,
    "one_row": ONE_ROW,
    "one_image": ONE_IMAGE,
    "some_without_negatives": ONE_ROW_WITHOUT_NEGATIVES,
}


def hard_negatives(images: list[int | None], texts: list[int | None]) -> HardNegatives:
    def chosen(rows):
        return torch.tensor([own if row is None else row for own, row in enumerate(rows)])

    def exists(rows):
        return torch.tensor([row is not None for row in rows])

    return HardNegatives(chosen(images), chosen(texts), exists(images), exists(texts))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("label_smoothing", "use_image_ids", "frequency", "readout"),
    [(0.1, True, 2, "cls"), (0.0, True, 1, "cls"), (0.1, False, 2, "cls"), (0.1, True, 2, "mean")],
)
def test_losses_and_all_gradients(case, label_smoothing, use_image_ids, frequency, readout):
    lengths, image_ids, negative_images, negative_texts = CASES[case]
    model = tiny_stage1(cross_attention_frequency=frequency, text_readout=readout).double()
    batch = random_batch(lengths, image_ids)
    parameters = dict(model.named_parameters())
    names = list(parameters)

    ours = objective(model, label_smoothing, use_image_ids)(batch, hard_negatives(negative_images, negative_texts))
    sizes = {"heads": 4, "layers": 2, "cross_attention_frequency": frequency}
    paper = PaperStage1(parameters, **sizes, dec_id=model.dec_id, text_readout=readout).losses(
        batch.patch_embeds,
        [row[keep].tolist() for row, keep in zip(batch.input_ids, batch.attention_mask, strict=True)],
        image_ids if use_image_ids else list(range(len(lengths))),
        negative_images,
        negative_texts,
        label_smoothing,
    )

    assert list(ours.losses) == ["itc", "itm", "itg"]
    reached = set()
    for term, expected in paper.items():
        assert ours.losses[term].dtype == torch.float64
        torch.testing.assert_close(ours.losses[term], expected, rtol=1e-9, atol=1e-12)
        got = torch.autograd.grad(ours.losses[term], list(parameters.values()), retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, mine, reference in zip(names, got, want, strict=True):
            mine = torch.zeros_like(reference) if mine is None else mine
            largest = reference.abs().max()
            # Below 1e-13 is rounding: a key's bias has no effect on a softmax, so its gradient is zero.
            difference = (mine - reference).abs().max()
            assert difference <= 1e-9 * largest + 1e-13, f"{term}, {name}: off by {difference} of {largest}"
            if largest > 1e-9:
                reached.add(name)
    if case == "ragged":
        dead = {name for name in names if name not in reached}
        assert not dead, f"no loss reaches {dead}: the comparison above would not see an error there"


def test_total_is_the_sum_of_the_three_with_equal_weights():
    output = objective(tiny_stage1().double())(random_batch([4, 5]))
    torch.testing.assert_close(output.total, sum(output.losses.values()))


def test_the_paper_s_masks_are_ours():
    lengths, queries, tokens = [5, 2, 1], 3, 5
    attention_mask = torch.arange(tokens)[None, :] < torch.tensor(lengths)[:, None]
    for kind, ours in {
        "itc": masks.unimodal_mask,
        "itg": masks.causal_mask,
        "itm": masks.bidirectional_mask,
    }.items():
        for row, length in enumerate(lengths):
            assert torch.equal(ours(queries, attention_mask)[row, 0], allowed(kind, queries, length, tokens)), kind
