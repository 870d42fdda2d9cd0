"""Who may attend to whom over [queries ; text]. True = may attend (PAPER: Figure 2 and section 3.1).

|                            | query→query | query→text | text→query | text→text |
|----------------------------|-------------|------------|------------|-----------|
| `unimodal_mask` (ITC)      | yes         | no         | no         | all       |
| `causal_mask` (ITG)        | yes         | no         | yes        | causal    |
| `bidirectional_mask` (ITM) | yes         | yes        | yes        | all       |
| `packed_mask` (ITC, ITG)   | yes         | no         | no, yes    | all, causal; none across |

`packed_mask` holds the text twice: before the comma the rule of the copy for ITC, after it of that for ITG.

Padding is never attended to. Every mask is `rows 1 length length`, ready to broadcast over heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

Mask = Bool[Tensor, "rows 1 length length"]


def unimodal_mask(num_queries: int, attention_mask: Bool[Tensor, "rows tokens"]) -> Mask:
    """Queries and text side by side, blind to each other."""
    tokens = attention_mask.shape[1]
    allowed = _blocks(num_queries, tokens, attention_mask.device)
    allowed[num_queries:, num_queries:] = True
    return _hide_padding(allowed, num_queries, attention_mask)


def causal_mask(num_queries: int, attention_mask: Bool[Tensor, "rows tokens"]) -> Mask:
    """Text reads the queries and earlier text; queries never read text (UniLM's multimodal causal mask)."""
    tokens = attention_mask.shape[1]
    allowed = _blocks(num_queries, tokens, attention_mask.device)
    allowed[num_queries:, :num_queries] = True
    allowed[num_queries:, num_queries:] = _lower_triangle(tokens, attention_mask.device)
    return _hide_padding(allowed, num_queries, attention_mask)


def bidirectional_mask(num_queries: int, attention_mask: Bool[Tensor, "rows tokens"]) -> Mask:
    """Everything reads everything."""
    length = num_queries + attention_mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device)
    return _hide_padding(allowed, num_queries, attention_mask)


def packed_mask(num_queries: int, attention_mask: Bool[Tensor, "rows tokens"]) -> Mask:
    """[queries ; text for ITC ; text for ITG] in one sequence: three passes of the paper in one forward.

    Exact, because in both objectives the queries see only queries: they are the same computation.
    """
    tokens = attention_mask.shape[1]
    contrastive = slice(num_queries, num_queries + tokens)
    generative = slice(num_queries + tokens, num_queries + 2 * tokens)
    allowed = _blocks(num_queries, 2 * tokens, attention_mask.device)
    allowed[contrastive, contrastive] = True
    allowed[generative, :num_queries] = True
    allowed[generative, generative] = _lower_triangle(tokens, attention_mask.device)
    return _hide_padding(allowed, num_queries, torch.cat([attention_mask, attention_mask], dim=1))


def _blocks(num_queries: int, tokens: int, device: torch.device) -> Bool[Tensor, "length length"]:
    """Only query→query allowed."""
    allowed = torch.zeros(num_queries + tokens, num_queries + tokens, dtype=torch.bool, device=device)
    allowed[:num_queries, :num_queries] = True
    return allowed


def _lower_triangle(tokens: int, device: torch.device) -> Bool[Tensor, "tokens tokens"]:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _hide_padding(
    allowed: Bool[Tensor, "length length"], num_queries: int, attention_mask: Bool[Tensor, "rows tokens"]
) -> Mask:
    queries_visible = attention_mask.new_ones(attention_mask.shape[0], num_queries)
    visible = torch.cat([queries_visible, attention_mask], dim=1)
    return allowed[None, None, :, :] & visible[:, None, None, :]
