"""Nucleus sampling by given random numbers: what is said of a picture does not depend on who else is in the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

FIRST_CANDIDATES = 64


def draws_for(names: Sequence[str], seed: int, answers: int, tokens: int) -> Float[Tensor, "names {answers} {tokens}"]:
    """Numbers in [0, 1) for `answers` texts of `tokens` tokens about each of `names`: a function of (seed, name)."""
    rows = [np.empty((0, answers, tokens), dtype=np.float32)]
    for name in names:
        entropy = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, entropy))))
        rows.append(generator.random((1, answers, tokens), dtype=np.float32))
    return torch.from_numpy(np.concatenate(rows))


class DrawnSampling(LogitsProcessor):
    """Chooses each row's next token from its nucleus by the row's own number; the choice keeps the only finite score.

    The nucleus is Hugging Face's: the likeliest tokens, until those before have reached `top_p` (arXiv 1904.09751).
    With the choice left as the only one, greedy decoding and sampling both take it. One object serves one generation.
    """

    def __init__(self, draws: Float[Tensor, "rows tokens"], top_p: float, temperature: float = 1.0) -> None:
        self.draws = draws
        self.top_p = top_p
        self.temperature = temperature
        self.step = 0

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        probabilities = (scores.float() / self.temperature).softmax(dim=-1)
        likeliest, tokens, before = self._likeliest(probabilities)
        nucleus = torch.where(before < self.top_p, likeliest, 0.0)
        reached = nucleus.cumsum(dim=-1)
        # A float32 below 1 times the sum, in float64, is below the sum: no token of probability 0 is ever reached.
        goal = self.draws[:, self.step, None].to(scores.device, torch.float64) * reached[:, -1:]
        self.step += 1
        chosen = tokens.gather(-1, torch.searchsorted(reached, goal, right=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    def _likeliest(
        self, probabilities: Float[Tensor, "rows vocabulary"]
    ) -> tuple[Tensor, Int[Tensor, "rows candidates"], Tensor]:
        """The likeliest tokens that surely hold every nucleus: probabilities, ids, and what the likelier ones sum to.

        Sorting the whole vocabulary would take longer than a small model takes to score it.
        """
        vocabulary = probabilities.shape[-1]
        count = min(FIRST_CANDIDATES, vocabulary)
        while True:
            likeliest, tokens = probabilities.topk(count)
            likeliest = likeliest.double()
            before = likeliest.cumsum(dim=-1) - likeliest
            if count == vocabulary or bool((before[:, -1] >= self.top_p).all()):
                return likeliest, tokens, before
            count = min(4 * count, vocabulary)
