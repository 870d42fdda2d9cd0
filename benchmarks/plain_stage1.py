"""The stage-1 step as the authors' code computes it, on the weights of a `Stage1Model`: the peer to beat.

Written from the paper and the known behaviour of that code: four passes, the image projected to keys and values in
each pass that reads it (three times for the three batches of ITM pairs), text padded to a fixed length, eager
attention with additive masks, every output of the last block, vocabulary logits at every position, negatives chosen
row by row. Dropout is off on both sides so that losses can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qformers.data.batch import IGNORED_LABEL
from qformers.models.attention import CrossAttention, merge_heads, split_heads
from qformers.models.stage1 import Stage1Model
from qformers.objectives.itm import HardNegatives

Cache = list[tuple[Tensor, Tensor]]


def plain_losses(
    model: Stage1Model, patch_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor, negatives: HardNegatives
) -> dict[str, Tensor]:
    """ITC, ITM and ITG of one batch without shared image ids. `input_ids` are padded to the fixed length."""
    batch, tokens = input_ids.shape
    patches = model.vision_norm(patch_embeds.float())
    queries = model.qformer.query_tokens.expand(batch, -1, -1)

    query_outputs, _, cache = run_blocks(model, queries, None, None, patches)
    image_features = F.normalize(model.vision_projection(query_outputs), dim=-1)
    text = model.qformer.text_embeddings(input_ids)
    _, text_outputs, _ = run_blocks(model, None, text, additive(attention_mask[:, None, None, :]), None)
    text_features = F.normalize(model.text_projection(text_outputs[:, 0]), dim=-1)
    similarity = torch.einsum("iqd,td->itq", image_features, text_features).amax(dim=-1)
    targets = torch.arange(batch, device=patch_embeds.device)
    itc = sum(
        F.cross_entropy(scores / model.temperature, targets, label_smoothing=0.1) / 2
        for scores in (similarity, similarity.T)
    )

    wrong_images = torch.stack([patches[index] for index in negatives.images])
    wrong_ids = torch.stack([input_ids[index] for index in negatives.texts])
    wrong_mask = torch.stack([attention_mask[index] for index in negatives.texts])
    pair_ids = torch.cat([input_ids, input_ids, wrong_ids])
    pair_mask = torch.cat([attention_mask, attention_mask, wrong_mask])
    visible = torch.cat([pair_mask.new_ones(3 * batch, queries.shape[1]), pair_mask], dim=1)
    pair_outputs, _, _ = run_blocks(
        model,
        model.qformer.query_tokens.expand(3 * batch, -1, -1),
        model.qformer.text_embeddings(pair_ids),
        additive(visible[:, None, None, :]),
        torch.cat([patches, wrong_images, patches]),
    )
    logits = model.itm_head(pair_outputs).mean(dim=1)
    labels = torch.cat([torch.ones_like(targets), torch.zeros_like(targets), torch.zeros_like(targets)])
    itm = F.cross_entropy(logits, labels)

    causal = attention_mask.new_ones(tokens, tokens).tril() & attention_mask[:, None, :]
    sees = torch.cat([causal.new_ones(batch, tokens, queries.shape[1]), causal], dim=2)
    generative = model.qformer.text_embeddings(model.with_dec(input_ids))
    _, outputs, _ = run_blocks(model, None, generative, additive(sees[:, None]), None, cache)
    vocabulary = model.token_logits(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
    next_ids = input_ids[:, 1:].masked_fill(~attention_mask[:, 1:], IGNORED_LABEL)
    itg = F.cross_entropy(vocabulary[:, :-1].flatten(0, 1), next_ids.flatten(), label_smoothing=0.1)
    return {"itc": itc, "itm": itm, "itg": itg}


@torch.inference_mode()
def plain_match_logits(model: Stage1Model, patch_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """ITM logits of one image with some texts, the image repeated for each and projected anew in every row."""
    rows = input_ids.shape[0]
    visible = torch.cat([attention_mask.new_ones(rows, model.qformer.num_queries), attention_mask], dim=1)
    outputs, _, _ = run_blocks(
        model,
        model.qformer.query_tokens.expand(rows, -1, -1),
        model.qformer.text_embeddings(input_ids),
        additive(visible[:, None, None, :]),
        model.vision_norm(patch_embeds.float()).repeat(rows, 1, 1),
    )
    return model.itm_head(outputs).mean(dim=1)


def run_blocks(
    model: Stage1Model,
    queries: Tensor | None,
    text: Tensor | None,
    mask: Tensor | None,
    patches: Tensor | None,
    past: Cache | None = None,
) -> tuple[Tensor, Tensor, Cache]:
    """[queries ; text] through every block, with the keys and values of `past` in front of each self-attention."""
    parts = [part for part in (queries, text) if part is not None]
    hidden = model.qformer.embedding_norm(torch.cat(parts, dim=1))
    number = 0 if queries is None else queries.shape[1]
    cache: Cache = []
    for layer, block in enumerate(model.qformer.blocks):
        attention = block.self_attention
        query, key, value = rearrange(
            attention.qkv(hidden), "b l (three h d) -> three b h l d", three=3, h=attention.heads
        ).unbind(0)
        cache.append((key, value))
        if past is not None:
            key, value = torch.cat([past[layer][0], key], dim=2), torch.cat([past[layer][1], value], dim=2)
        hidden = block.self_attention_norm(hidden + attention.out(merge_heads(eager(query, key, value, mask))))
        image_side, text_side = hidden[:, :number], hidden[:, number:]
        if number and block.cross_attention is not None:
            image_side = block.cross_attention_norm(image_side + read_image(block.cross_attention, image_side, patches))
        sides = []
        if number:
            sides.append(block.query_ffn_norm(image_side + block.query_ffn(image_side)))
        if text is not None:
            sides.append(block.text_ffn_norm(text_side + block.text_ffn(text_side)))
        hidden = torch.cat(sides, dim=1)
    return hidden[:, :number], hidden[:, number:], cache


def read_image(attention: CrossAttention, queries: Tensor, patches: Tensor) -> Tensor:
    """Cross-attention with keys and values projected anew for every row."""
    key, value = attention.kv(patches).chunk(2, dim=-1)
    query, key, value = (split_heads(part, attention.heads) for part in (attention.query(queries), key, value))
    return attention.out(merge_heads(eager(query, key, value, None)))


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention written out."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(dim=-1) @ value


def additive(visible: Tensor) -> Tensor:
    """0 where visible, a very large negative number elsewhere."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, torch.finfo(torch.float32).min)
