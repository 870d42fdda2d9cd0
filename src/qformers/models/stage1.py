"""The stage-1 model: a frozen image encoder, the Q-Former that reads it, and the three objectives' heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qformers.models.attention import ImageMemory
from qformers.models.config import TextReadout
from qformers.models.masks import causal_mask, packed_mask, unimodal_mask
from qformers.models.qformer import BERT_NORM_EPS, QFormer, TextEmbeddings
from qformers.models.reader import ImageReader, at_least_fp32
from qformers.models.vision import VisionEncoder


class TokenHead(nn.Module):
    """BERT's masked-language head on the ITG outputs; its output weights are the word embeddings (tied)."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=BERT_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self, hidden: Float[Tensor, "labelled dim"], word_embeddings: Float[Tensor, "vocabulary dim"]
    ) -> Float[Tensor, "labelled vocabulary"]:
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embeddings, self.bias)


@dataclass(frozen=True)
class ImageEncoding:
    """An image as the Q-Former sees it: its memory, the query outputs Z, and Z projected for ITC."""

    memory: ImageMemory
    query_outputs: Float[Tensor, "images queries dim"]
    image_features: Float[Tensor, "images queries embed_dim"]


@dataclass(frozen=True)
class PackedPass:
    """What one packed forward gives: ITC's image side and text side, and the states that ITG reads."""

    image: ImageEncoding
    text_features: Float[Tensor, "rows embed_dim"]
    generative_outputs: Float[Tensor, "rows predictions dim"]


class Stage1Model(ImageReader):
    """Built from its parts (`presets.build_stage1` has the sizes).

    `vision_encoder` is frozen (`freezing.freeze`); everything else is trained. Patch embeddings may come from
    it or from a store of precomputed features: every method takes `patch_embeds`.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        vision_norm: nn.LayerNorm,
        qformer: QFormer,
        vision_projection: nn.Linear,
        text_projection: nn.Linear,
        itm_head: nn.Linear,
        itg_head: TokenHead,
        temperature: nn.Parameter,
        dec_id: int,
        text_readout: TextReadout = "cls",
    ) -> None:
        super().__init__(vision_encoder, vision_norm, qformer)
        self.vision_projection = vision_projection
        self.text_projection = text_projection
        self.itm_head = itm_head
        self.itg_head = itg_head
        self.temperature = temperature
        self.dec_id = dec_id
        self.text_readout = text_readout

    def encode_image(self, patch_embeds: Float[Tensor, "images patches vision_dim"]) -> ImageEncoding:
        """Query outputs and ITC features of images alone."""
        memory = self.remember(patch_embeds)
        return self._image_encoding(memory, self.query(memory))

    def encode_text(
        self, input_ids: Int[Tensor, "rows tokens"], attention_mask: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows embed_dim"]:
        """ITC features of texts alone, projected and L2-normalised: [CLS]'s output, or the mean (`text_readout`)."""
        rows, tokens = input_ids.shape
        text = self.qformer.text_embeddings(input_ids)
        reads = torch.arange(self._contrastive_reads(tokens), device=input_ids.device)
        mask = unimodal_mask(0, attention_mask)
        _, outputs = self.qformer(self.qformer.no_queries(rows), text, mask, [], text_reads=reads)
        return self._text_features(outputs, attention_mask)

    def packed_pass(
        self,
        patch_embeds: Float[Tensor, "rows patches vision_dim"],
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows tokens"],
    ) -> PackedPass:
        """ITC's image pass, ITC's text pass and ITG's pass in one forward.

        In all three the queries see only queries, so one query pass serves ITC and ITG. The last block
        computes [CLS] of the contrastive copy (all of it for the mean) and all but the last token of the generative
        one: nothing else is read.
        """
        rows, tokens = input_ids.shape
        contrastive_reads = self._contrastive_reads(tokens)
        memory = self.remember(patch_embeds)
        contrastive = self.qformer.text_embeddings(input_ids)
        generative = self.qformer.text_embeddings(self.with_dec(input_ids))
        positions = torch.arange(2 * tokens - 1, device=input_ids.device)
        query_outputs, text_outputs = self.qformer(
            self.qformer.queries(rows),
            torch.cat([contrastive, generative], dim=1),
            packed_mask(self.qformer.num_queries, attention_mask),
            [memory],
            text_reads=torch.cat([positions[:contrastive_reads], positions[tokens:]]),
        )
        return PackedPass(
            image=self._image_encoding(memory, query_outputs),
            text_features=self._text_features(text_outputs[:, :contrastive_reads], attention_mask),
            generative_outputs=text_outputs[:, contrastive_reads:],
        )

    def match_logits(
        self,
        memories: Sequence[ImageMemory],
        input_ids: Int[Tensor, "pairs tokens"],
        attention_mask: Bool[Tensor, "pairs tokens"],
    ) -> Float[Tensor, "pairs 2"]:
        """ITM logits (index 1 = match), averaged over the queries; `memories` serve the pairs in order."""
        query_outputs = self.query_with_text(memories, input_ids, attention_mask)
        # The head is linear, so the mean may come first; averaging the logits would be the same number.
        return at_least_fp32(self.itm_head(query_outputs.mean(dim=1)))

    def next_token_logits(
        self,
        memory: ImageMemory,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """ITG logits for each position of `input_ids`, whose first token is replaced by [DEC]."""
        rows = input_ids.shape[0]
        _, outputs = self.qformer(
            self.qformer.queries(rows),
            self.qformer.text_embeddings(self.with_dec(input_ids)),
            causal_mask(self.qformer.num_queries, attention_mask),
            [memory],
        )
        logits = self.token_logits(outputs.flatten(0, 1))
        return logits.unflatten(0, (rows, input_ids.shape[1]))

    def token_logits(self, hidden: Float[Tensor, "labelled dim"]) -> Float[Tensor, "labelled vocabulary"]:
        """Vocabulary logits of chosen positions, so that the head runs only where there is a label."""
        words = self.qformer.text_embeddings
        assert isinstance(words, TextEmbeddings), "a stage-1 model has a text branch"
        return at_least_fp32(self.itg_head(hidden, words.word.weight))

    def with_dec(self, input_ids: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
        """[CLS] replaced by [DEC], the token that starts generation (BLIP-2, section 3.1)."""
        start = torch.full_like(input_ids[:, :1], self.dec_id)
        return torch.cat([start, input_ids[:, 1:]], dim=1)

    def _image_encoding(self, memory: ImageMemory, query_outputs: Float[Tensor, "images queries dim"]) -> ImageEncoding:
        features = F.normalize(at_least_fp32(self.vision_projection(query_outputs)), dim=-1)
        return ImageEncoding(memory=memory, query_outputs=query_outputs, image_features=features)

    def _contrastive_reads(self, tokens: int) -> int:
        """How many of a text's outputs ITC reads, from [CLS] on."""
        return 1 if self.text_readout == "cls" else tokens

    def _text_features(
        self, outputs: Float[Tensor, "rows reads dim"], attention_mask: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows embed_dim"]:
        if self.text_readout == "cls":
            read = outputs[:, 0]
        else:
            real = attention_mask.unsqueeze(-1)
            # Padding may hold anything, which a product with 0 would not always remove.
            read = torch.where(real, outputs, 0).sum(dim=1) / real.sum(dim=1)
        return F.normalize(at_least_fp32(self.text_projection(read)), dim=-1)
