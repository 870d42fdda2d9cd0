"""Image-grounded text generation (BLIP-2, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qformers.models.stage1 import Stage1Model


def itg_loss(
    model: Stage1Model,
    generative_outputs: Float[Tensor, "batch predictions dim"],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Bool[Tensor, "batch tokens"],
    label_smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Next-token cross-entropy: output *t* predicts token *t + 1*, padding ignored, [SEP] included.

    The vocabulary head runs on the labelled positions only.

    Args:
        label_smoothing: 0.1 in the authors' code.
    """
    labelled = attention_mask[:, 1:]
    logits = model.token_logits(generative_outputs[labelled])
    return F.cross_entropy(logits, input_ids[:, 1:][labelled], label_smoothing=label_smoothing)
