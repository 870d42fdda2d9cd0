"""Stage 1 of BLIP-2 the slow way, as the paper tells it: the measure for the real one.

Nothing is shared, packed, trimmed or folded: every (image, text) pair makes its own pass for each objective,
projects the image anew, pads its text to a fixed length, and runs the vocabulary head on every position.
Only the parameters' names come from the model under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# (from, to) → who may attend. "causal" is text reading itself and earlier text.
MASKS = {
    "itc": {
        ("query", "query"): "all",
        ("query", "text"): "none",
        ("text", "query"): "none",
        ("text", "text"): "all",
    },
    "itg": {
        ("query", "query"): "all",
        ("query", "text"): "none",
        ("text", "query"): "all",
        ("text", "text"): "causal",
    },
    "itm": {
        ("query", "query"): "all",
        ("query", "text"): "all",
        ("text", "query"): "all",
        ("text", "text"): "all",
    },
}


@dataclass
class PaperStage1:
    parameters: Mapping[str, Tensor]
    heads: int
    layers: int
    cross_attention_frequency: int
    dec_id: int
    padded_tokens: int = 12
    text_readout: str = "cls"

    def losses(
        self,
        patch_embeds: Tensor,
        texts: list[list[int]],
        image_ids: list[int],
        negative_images: list[int | None],
        negative_texts: list[int | None],
        label_smoothing: float,
    ) -> dict[str, Tensor]:
        return {
            "itc": self.itc(patch_embeds, texts, image_ids, label_smoothing),
            "itm": self.itm(patch_embeds, texts, negative_images, negative_texts),
            "itg": self.itg(patch_embeds, texts, label_smoothing),
        }

    def itc(self, patch_embeds: Tensor, texts: list[list[int]], image_ids: list[int], label_smoothing: float) -> Tensor:
        rows = len(texts)
        image_features, text_features = [], []
        for patches, text in zip(patch_embeds, texts, strict=True):
            queries, tokens = self.transformer(patches, text, "itc")
            image_features.append(unit(self.linear("vision_projection", queries)))
            read = tokens[: len(text)].mean(dim=0) if self.text_readout == "mean" else tokens[0]
            text_features.append(unit(self.linear("text_projection", read)))
        similarity = torch.stack(
            [torch.stack([(image @ text).max() for text in text_features]) for image in image_features]
        )
        logits = similarity / self.parameters["temperature"]
        loss = torch.zeros((), dtype=logits.dtype)
        for direction in (logits, logits.T):
            for row in range(rows):
                same = torch.tensor([image_ids[row] == other for other in image_ids], dtype=logits.dtype)
                target = (1 - label_smoothing) * same / same.sum() + label_smoothing / rows
                loss = loss - (target * log_softmax(direction[row])).sum() / (2 * rows)
        return loss

    def itm(
        self,
        patch_embeds: Tensor,
        texts: list[list[int]],
        negative_images: list[int | None],
        negative_texts: list[int | None],
    ) -> Tensor:
        rows = range(len(texts))
        pairs = [(row, row, 1) for row in rows]
        pairs += [(image, row, 0) for row, image in zip(rows, negative_images, strict=True) if image is not None]
        pairs += [(row, text, 0) for row, text in zip(rows, negative_texts, strict=True) if text is not None]
        terms = []
        for image, text, label in pairs:
            queries, _ = self.transformer(patch_embeds[image], texts[text], "itm")
            logits = torch.stack([self.linear("itm_head", query) for query in queries]).mean(dim=0)
            terms.append(-log_softmax(logits)[label])
        return torch.stack(terms).mean()

    def itg(self, patch_embeds: Tensor, texts: list[list[int]], label_smoothing: float) -> Tensor:
        terms = []
        for patches, text in zip(patch_embeds, texts, strict=True):
            _, tokens = self.transformer(patches, [self.dec_id, *text[1:]], "itg")
            hidden = self.norm("itg_head.norm", gelu(self.linear("itg_head.transform", tokens)), eps=1e-12)
            words = self.parameters["qformer.text_embeddings.word.weight"]
            scores = log_softmax(hidden @ words.T + self.parameters["itg_head.bias"])
            for position, following in enumerate(text[1:]):
                likelihood = (1 - label_smoothing) * scores[position, following]
                terms.append(-likelihood - label_smoothing * scores[position].mean())
        return torch.stack(terms).mean()

    def transformer(self, patches: Tensor, text: list[int], kind: str) -> tuple[Tensor, Tensor]:
        """Last hidden states of the queries and of the (padded) text, for one image and one text."""
        parameters = self.parameters
        image = self.norm("vision_norm", patches, eps=1e-5)
        ids = torch.tensor(text + [0] * (self.padded_tokens - len(text)))
        positions = torch.arange(self.padded_tokens)
        words = parameters["qformer.text_embeddings.word.weight"][ids]
        words = words + parameters["qformer.text_embeddings.position.weight"][positions]
        queries = parameters["qformer.query_tokens"]
        count = len(queries)
        hidden = self.norm("qformer.embedding_norm", torch.cat([queries, words]), eps=1e-12)
        mask = allowed(kind, count, len(text), self.padded_tokens)
        for number in range(self.layers):
            block = f"qformer.blocks.{number}"
            query, key, value = self.projected(f"{block}.self_attention.qkv", hidden, 3)
            attended = self.linear(f"{block}.self_attention.out", self.attention(query, key, value, mask))
            hidden = self.norm(f"{block}.self_attention_norm", hidden + attended, eps=1e-12)
            queries, words = hidden[:count], hidden[count:]
            if number % self.cross_attention_frequency == 0:
                query = self.linear(f"{block}.cross_attention.query", queries)
                key, value = self.projected(f"{block}.cross_attention.kv", image, 2)
                everything = torch.ones(count, len(image), dtype=torch.bool)
                read = self.linear(f"{block}.cross_attention.out", self.attention(query, key, value, everything))
                queries = self.norm(f"{block}.cross_attention_norm", queries + read, eps=1e-12)
            queries = self.feed_forward(f"{block}.query_ffn", queries)
            words = self.feed_forward(f"{block}.text_ffn", words)
            hidden = torch.cat([queries, words])
        return hidden[:count], hidden[count:]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        width = query.shape[1] // self.heads
        outputs = []
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[:, part] @ key[:, part].T / math.sqrt(width)
            weights = torch.exp(log_softmax(scores.masked_fill(~mask, -math.inf)))
            outputs.append(weights @ value[:, part])
        return torch.cat(outputs, dim=1)

    def feed_forward(self, name: str, hidden: Tensor) -> Tensor:
        inner = gelu(self.linear(f"{name}.up", hidden))
        return self.norm(f"{name}_norm", hidden + self.linear(f"{name}.down", inner), eps=1e-12)

    def linear(self, name: str, hidden: Tensor) -> Tensor:
        return hidden @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def projected(self, name: str, hidden: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Queries, keys and values, each by its own rows of the stored weight."""
        weights = self.parameters[f"{name}.weight"].chunk(parts)
        biases = self.parameters[f"{name}.bias"].chunk(parts)
        return tuple(hidden @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))

    def norm(self, name: str, hidden: Tensor, eps: float) -> Tensor:
        centred = hidden - hidden.mean(dim=-1, keepdim=True)
        normalised = centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + eps)
        return normalised * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]


def allowed(kind: str, queries: int, real_tokens: int, padded_tokens: int) -> Tensor:
    """The table `MASKS[kind]`, position by position; padding is never attended to."""
    length = queries + padded_tokens
    mask = torch.zeros(length, length, dtype=torch.bool)
    for row in range(length):
        for column in range(queries + real_tokens):
            rule = MASKS[kind]["query" if row < queries else "text", "query" if column < queries else "text"]
            mask[row, column] = rule == "all" or (rule == "causal" and column <= row)
    return mask


def unit(features: Tensor) -> Tensor:
    return features / torch.sqrt((features**2).sum(dim=-1, keepdim=True))


def gelu(hidden: Tensor) -> Tensor:
    return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2


def log_softmax(scores: Tensor) -> Tensor:
    return scores - torch.logsumexp(scores, dim=-1, keepdim=True)
