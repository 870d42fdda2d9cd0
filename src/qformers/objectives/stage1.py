"""One stage-1 step's mathematics: ITC + ITM + ITG over one batch (BLIP-2, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.distributed import GlobalMean, fetch_rows, world_size
from qformers.models.attention import ImageMemory
from qformers.models.stage1 import ImageEncoding, Stage1Model
from qformers.objectives.cached import (
    CachedContrast,
    Features,
    cached_contrasts,
    fetch_negatives,
    with_patch_embeds,
)
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.contrast import contrast, draw_negatives
from qformers.objectives.itg import itg_loss
from qformers.objectives.itm import HardNegatives, Texts, fetch_texts, itm_labels, itm_logits, itm_loss
from qformers.objectives.output import Drawing, StepOutput, count_passes, patch_embeds_of, row_slices

Arguments = tuple[Batch, HardNegatives | None, GlobalMean, CachedContrast | None]


class Stage1Objective(nn.Module):
    """The model with its three losses as one module: distributed wrappers then see one forward per pass.

    `draws` decides ITM's negatives; it has the same state on every process.
    """

    def __init__(self, model: Stage1Model, config: Stage1LossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.itc_alone = config.itc_steps > 0
        self.draws = torch.Generator()

    def forward(
        self,
        batch: Batch,
        negatives: HardNegatives | None = None,
        over_tokens: GlobalMean | None = None,
        cached: CachedContrast | None = None,
    ) -> StepOutput:
        """Losses of a batch; or of a micro-batch, ITC of whose whole batch is `cached`.

        Args:
            negatives: rows of the global batch; drawn unless given (tests give them).
            over_tokens: the tokens that ITG's mean is taken over; None: this call's, on all processes.
        """
        model, config = self.model, self.config
        patches = patch_embeds_of(batch, model)
        image, text_features, generative_outputs = self._encode(batch, patches)
        features = image.image_features, text_features
        stats = {"temperature": model.temperature.detach(), "query_diversity": query_diversity(image.query_outputs)}
        if cached is None:
            whole = contrast(*features, model.temperature, batch.image_ids, config)
            itc, stats["itc_accuracy"] = whole.loss, whole.accuracy
            if not self._itc_alone_now and negatives is None:
                drawn = draw_negatives(whole, model.temperature, self.draws, config)
                negatives = drawn.rows(slice(self._scored(len(batch))))
        else:
            itc, stats["itc_accuracy"] = cached.loss(features, model.temperature), cached.accuracy
        if self._itc_alone_now:
            return StepOutput({"itc": itc}, stats)

        chosen, memory, texts, over_pairs = self._wrong_rows(batch, patches, image, negatives, cached)
        scored = len(chosen.images)
        own = batch.input_ids[:scored], batch.attention_mask[:scored]
        logits = itm_logits(model, image.memory.first(scored), own, memory, texts)
        labels = itm_labels(chosen)
        itm, stats["itm_accuracy"] = itm_loss(logits, labels, over_pairs), itm_accuracy(logits, labels, over_pairs)
        if generative_outputs is None:
            return StepOutput({"itc": itc, "itm": itm}, stats)

        smoothing = config.label_smoothing
        itg = itg_loss(model, generative_outputs, batch.input_ids, batch.attention_mask, smoothing, over_tokens)
        return StepOutput({"itc": itc, "itm": itm, "itg": itg}, stats)

    def passes(self, batches: Sequence[Batch], micro_batch_size: int | None, drawing: Drawing) -> Iterator[Arguments]:
        """The arguments of each forward pass of one step; gradients are to be averaged over the passes.

        ITC and ITM contrast within each batch (of all processes), not over accumulated ones; their losses are means
        over the batches. A batch cut into micro-batches gives the gradients of the whole one.
        """
        count = count_passes(batches, micro_batch_size)
        over_tokens = GlobalMean.over(
            torch.stack([batch.attention_mask[:, 1:].sum() for batch in batches]).sum(), count
        )
        if count == len(batches):
            yield from ((batch, None, over_tokens, None) for batch in batches)
            return
        first, weight = 0, count / len(batches)
        for batch in batches:
            for piece, cached in self._cached(batch, micro_batch_size, weight, first, drawing):
                yield piece, None, over_tokens, cached
            first += count_passes([batch], micro_batch_size)

    @torch.no_grad()
    def _cached(
        self, batch: Batch, micro_batch_size: int | None, weight: float, first: int, drawing: Drawing
    ) -> Iterator[tuple[Batch, CachedContrast]]:
        """Each micro-batch of `batch` with the gradients of its features; `first` is the number of its first pass."""
        model, slices = self.model, row_slices(len(batch), micro_batch_size)
        with drawing(first):
            batch = with_patch_embeds(batch, slices, model)
        pieces = [batch.rows(rows) for rows in slices]
        features: list[Features] = []
        for number, piece in enumerate(pieces, first):
            with drawing(number):
                image, text_features, _ = self._encode(piece, patch_embeds_of(piece, model))
            features.append((image.image_features, text_features))
        whole, parts = cached_contrasts(features, model.temperature, batch.image_ids, self.config, weight)
        if self._itc_alone_now:
            yield from zip(pieces, parts, strict=True)
            return
        drawn = draw_negatives(whole, model.temperature, self.draws, self.config)
        chosen = [drawn.rows(slice(rows.start, rows.start + self._scored(rows.stop - rows.start))) for rows in slices]
        fetched = fetch_negatives(batch, chosen, weight)
        for piece, part, negatives in zip(pieces, parts, fetched, strict=True):
            yield piece, replace(part, negatives=negatives)

    def _encode(
        self, batch: Batch, patches: Float[Tensor, "rows patches vision_dim"]
    ) -> tuple[ImageEncoding, Float[Tensor, "rows embed_dim"], Float[Tensor, "rows predictions dim"] | None]:
        """Both sides of ITC, and what ITG predicts from; None where there is no ITG."""
        if self._itc_alone_now or not self.config.itg:
            image = self.model.encode_image(patches)
            return image, self.model.encode_text(batch.input_ids, batch.attention_mask), None
        packed = self.model.packed_pass(patches, batch.input_ids, batch.attention_mask)
        return packed.image, packed.text_features, packed.generative_outputs

    def _wrong_rows(
        self,
        batch: Batch,
        patches: Float[Tensor, "rows patches vision_dim"],
        image: ImageEncoding,
        negatives: HardNegatives | None,
        cached: CachedContrast | None,
    ) -> tuple[HardNegatives, ImageMemory, Texts, GlobalMean]:
        """ITM's negatives, the memory of the wrong images, the wrong texts, and the pairs that the mean is over."""
        if cached is not None and cached.negatives is not None:
            chosen, rows = cached.negatives.chosen, cached.negatives.rows
            memory = self.model.remember(patch_embeds_of(rows, self.model))
            return chosen, memory, (rows.input_ids, rows.attention_mask), cached.negatives.over_pairs
        assert negatives is not None, "a batch that is not cached draws its own"
        texts = fetch_texts((batch.input_ids, batch.attention_mask), negatives.texts)
        if world_size() == 1:
            memory = image.memory.select(negatives.images)
        else:
            # Patches are several times smaller than the keys and values made of them, and need no gradient to
            # travel back where the encoder is frozen.
            memory = self.model.remember(fetch_rows(patches, negatives.images))
        return negatives, memory, texts, GlobalMean.over(negatives.pairs)

    @property
    def _itc_alone_now(self) -> bool:
        return self.itc_alone and self.training

    def _scored(self, rows: int) -> int:
        """How many of a pass's rows ITM scores."""
        return math.ceil(self.config.itm_fraction * rows)

    def before_step(self, step: int, seed: int) -> None:
        """Choose the losses of `step` (from 1) and its draws; training calls it before every step.

        Args:
            seed: the same on every process.
        """
        self.itc_alone = step <= self.config.itc_steps
        self.draws.manual_seed(seed)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature within its bounds; training calls it after every optimiser step.

        The authors let it run free. At a large learning rate it then crosses zero, where ITC pulls apart what
        belongs together.
        """
        self.model.temperature.clamp_(self.config.min_temperature, self.config.max_temperature)


@torch.no_grad()
def query_diversity(query_outputs: Float[Tensor, "images queries dim"]) -> Float[Tensor, ""]:
    """The share (0–1) of the query outputs that differs between the queries of one image.

    Near 0 all queries say the same, and the Q-Former is worth one: it happens in short runs at large
    learning rates, and the losses do not show it.
    """
    outputs = query_outputs.detach().float()
    between = outputs - outputs.mean(dim=1, keepdim=True)
    return between.pow(2).mean() / outputs.pow(2).mean()


@torch.no_grad()
def itm_accuracy(
    logits: Float[Tensor, "pairs 2"], labels: Int[Tensor, " pairs"], over: GlobalMean
) -> Float[Tensor, ""]:
    """The share of ITM's pairs that are told right; always saying "no match" is right in two thirds."""
    counted = labels != IGNORED_LABEL
    return over.share(((logits.argmax(dim=1) == labels) & counted).sum().float())
