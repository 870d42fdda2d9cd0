"""Image-grounded text generation (BLIP-2, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.distributed import GlobalMean
from qformers.models.stage1 import Stage1Model


def itg_loss(
    model: Stage1Model,
    generative_outputs: Float[Tensor, "batch predictions dim"],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Bool[Tensor, "batch tokens"],
    label_smoothing: float = 0.1,
    over: GlobalMean | None = None,
) -> Float[Tensor, ""]:
    """Next-token cross-entropy: output *t* predicts token *t + 1*, padding ignored, [SEP] included.

    The vocabulary head runs on the labelled positions only.

    Args:
        label_smoothing: 0.1 in the authors' code.
        over: the predicted tokens that the mean is taken over; None: this call's, on all processes.
    """
    labelled = attention_mask[:, 1:]
    over = over or GlobalMean.over(labelled.sum())
    logits = model.token_logits(generative_outputs[labelled])
    targets = input_ids[:, 1:][labelled]
    return over.share(F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum"))
