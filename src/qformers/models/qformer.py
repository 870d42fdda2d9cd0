"""The Q-Former: learned queries and text through one stack of blocks (BLIP-2, section 3.1).

Two transformers share their self-attention. The *image transformer* is fed by learned queries and reads the
image through cross-attention; the *text transformer* is fed by tokens. What they may see of each other is
decided by the mask alone (`masks.py`), so ITC, ITG and ITM are three masks over one network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qformers.errors import CheckpointError
from qformers.models.attention import CrossAttention, ImageMemory, SelfAttention

BERT_NORM_EPS = 1e-12


class FeedForward(nn.Module):
    """BERT's feed-forward layer with exact (erf) GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, hidden: Float[Tensor, "*places dim"]) -> Float[Tensor, "*places dim"]:
        return self.down(F.gelu(self.up(hidden)))


class NoText(nn.Module):
    """Stands in every place of the text branch of a Q-Former that has none (BLIP-2's stage 2 in Hugging Face's format).

    It has no weights, lets the empty text of `QFormer.no_text` through, and refuses any other.
    """

    vocab_size = 0

    def forward(self, text: Tensor) -> Tensor:
        if text.shape[1]:
            raise CheckpointError(
                "this Q-Former has no text branch: texts can be read by a stage-1 model, or by InstructBLIP's"
            )
        return text


class Block(nn.Module):
    """Self-attention → (queries only) cross-attention → separate feed-forwards, a LayerNorm after each."""

    def __init__(
        self,
        self_attention: SelfAttention,
        cross_attention: CrossAttention | None,
        query_ffn: FeedForward,
        text_ffn: FeedForward | NoText,
        dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_attention_norm = nn.LayerNorm(dim, eps=BERT_NORM_EPS)
        self.cross_attention = cross_attention
        self.cross_attention_norm = nn.LayerNorm(dim, eps=BERT_NORM_EPS) if cross_attention else None
        self.query_ffn = query_ffn
        self.query_ffn_norm = nn.LayerNorm(dim, eps=BERT_NORM_EPS)
        self.text_ffn = text_ffn
        has_text = isinstance(text_ffn, FeedForward)
        self.text_ffn_norm = nn.LayerNorm(dim, eps=BERT_NORM_EPS) if has_text else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Float[Tensor, "rows queries dim"],
        text: Float[Tensor, "rows tokens dim"],
        mask: Bool[Tensor, "rows 1 length length"] | None,
        memories: Sequence[tuple[Tensor, Tensor, int]],
        text_reads: Int[Tensor, " reads"] | None,
        real: Int[Tensor, " real"] | None,
    ) -> tuple[Float[Tensor, "rows queries dim"], Float[Tensor, "rows text_outputs dim"]]:
        num_queries = queries.shape[1]
        hidden = torch.cat([queries, text], dim=1)
        reads = None
        if text_reads is not None:
            every_query = torch.arange(num_queries, device=hidden.device)
            reads = torch.cat([every_query, num_queries + text_reads])
        attended = self.dropout(self.self_attention(hidden, mask, reads))
        residual = hidden if reads is None else hidden.index_select(1, reads)
        hidden = self.self_attention_norm(residual + attended)
        queries, text = split_text(hidden, num_queries)
        if self.cross_attention is not None and self.cross_attention_norm is not None and num_queries:
            read = self.dropout(self.cross_attention(queries, memories))
            queries = self.cross_attention_norm(queries + read)
        queries = self.query_ffn_norm(queries + self.dropout(self.query_ffn(queries)))
        if real is None:
            return queries, self._text_layer(text)
        computed = self._text_layer(text.flatten(0, 1).index_select(0, real))
        padded = computed.new_zeros(text.shape).flatten(0, 1).index_copy(0, real, computed)
        return queries, padded.view(text.shape)

    def _text_layer(self, text: Float[Tensor, "*places dim"]) -> Float[Tensor, "*places dim"]:
        """The text's feed-forward and its norm, which look at each token alone."""
        return self.text_ffn_norm(text + self.dropout(self.text_ffn(text)))


class TextEmbeddings(nn.Module):
    """Word and position embeddings. The vocabulary is BERT's plus [DEC], the last id; no token types."""

    def __init__(self, vocab_size: int, max_positions: int, dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_positions, dim)

    @property
    def vocab_size(self) -> int:
        return self.word.num_embeddings

    def forward(self, input_ids: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens dim"]:
        return self.word(input_ids) + self.position.weight[: input_ids.shape[1]]


class QFormer(nn.Module):
    """Learned queries (N(0, 0.02), no position embedding), text embeddings and the shared stack of blocks."""

    def __init__(
        self,
        query_tokens: nn.Parameter,
        text_embeddings: TextEmbeddings | NoText,
        blocks: nn.ModuleList,
        dropout: float,
    ) -> None:
        super().__init__()
        self.query_tokens = query_tokens
        self.text_embeddings = text_embeddings
        self.embedding_norm = nn.LayerNorm(query_tokens.shape[1], eps=BERT_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = blocks

    @property
    def num_queries(self) -> int:
        return self.query_tokens.shape[0]

    @property
    def vocab_size(self) -> int:
        """Words that the text branch knows, [DEC] included; 0 without a text branch."""
        return self.text_embeddings.vocab_size

    def queries(self, rows: int) -> Float[Tensor, "rows queries dim"]:
        """The learned queries, the same for every row (a view, not a copy)."""
        return self.query_tokens.expand(rows, -1, -1)

    def no_queries(self, rows: int) -> Float[Tensor, "rows 0 dim"]:
        """For passes that run the text transformer alone."""
        return self.query_tokens[:0].expand(rows, -1, -1)

    def no_text(self, rows: int) -> Float[Tensor, "rows 0 dim"]:
        """For passes that run the image transformer alone."""
        return self.query_tokens.new_zeros(rows, 0, self.query_tokens.shape[1])

    def remember(
        self,
        patches: Float[Tensor, "images patches vision_dim"],
        scale: Float[Tensor, " vision_dim"] | None = None,
        shift: Float[Tensor, " vision_dim"] | None = None,
    ) -> ImageMemory:
        """Keys and values of `patches * scale + shift` for every cross-attending block, once per image."""
        pairs = [
            block.cross_attention.keys_values(patches, scale, shift)
            for block in self.blocks
            if isinstance(block.cross_attention, CrossAttention)
        ]
        keys, values = zip(*pairs, strict=True)
        return ImageMemory(keys=keys, values=values)

    def forward(
        self,
        queries: Float[Tensor, "rows queries dim"],
        text: Float[Tensor, "rows tokens dim"],
        mask: Bool[Tensor, "rows 1 length length"] | None,
        memories: Sequence[ImageMemory],
        text_reads: Int[Tensor, " reads"] | None = None,
    ) -> tuple[Float[Tensor, "rows queries dim"], Float[Tensor, "rows text_outputs dim"]]:
        """Run [queries ; text] through the blocks.

        Args:
            queries: `queries(rows)`, or `no_queries(rows)` for text alone.
            text: embedded tokens, or `no_text(rows)` for queries alone.
            mask: one of `masks.py`; None lets everything attend to everything.
            memories: the images that the rows read, in row order; empty when there are no queries.
            text_reads: text positions whose last outputs are wanted (None: all). The last block computes no
                others, since nothing after it reads them. Of padding the outputs mean nothing.

        Returns:
            Last hidden states of the queries, and of the text positions asked for.
        """
        hidden = self.dropout(self.embedding_norm(torch.cat([queries, text], dim=1)))
        queries, text = split_text(hidden, queries.shape[1])
        tokens = None if mask is None else _hold_tokens(mask, queries.shape[1])
        real = _without_padding(tokens)
        cross_blocks = 0
        for number, block in enumerate(self.blocks):
            layer_memories = []
            if block.cross_attention is not None:
                layer_memories = [
                    (memory.keys[cross_blocks], memory.values[cross_blocks], memory.rows_per_image)
                    for memory in memories
                ]
                cross_blocks += 1
            reads = text_reads if number == len(self.blocks) - 1 else None
            if reads is not None and tokens is not None:
                real = _without_padding(tokens.index_select(1, reads))
            queries, text = block(queries, text, mask, layer_memories, reads, real)
        return queries, text


def split_text(
    hidden: Float[Tensor, "rows length dim"], num_queries: int
) -> tuple[Float[Tensor, "rows queries dim"], Float[Tensor, "rows tokens dim"]]:
    """Queries and text of [queries ; text].

    Two slices would each leave a gradient of the whole length, mostly zeros, to be added to the other's. Both are
    copies: PyTorch multiplies a slice of three dimensions row by row, on a CPU many times slower in bfloat16.
    """
    queries, text = hidden.split([num_queries, hidden.shape[1] - num_queries], dim=1)
    return queries.contiguous(), text.contiguous()


def _hold_tokens(mask: Bool[Tensor, "rows 1 length length"], num_queries: int) -> Bool[Tensor, "rows tokens"]:
    """Which places of the text are not padding: under every mask a token sees itself."""
    return mask[:, 0].diagonal(dim1=1, dim2=2)[:, num_queries:]


def _without_padding(tokens: Bool[Tensor, "rows tokens"] | None) -> Int[Tensor, " real"] | None:
    """The places of all tokens in the flattened text; None where every place is computed, padding or not.

    That is without padding, and off a CPU, where to count tokens is to wait for the device, or to compile anew.
    """
    if tokens is None or tokens.device.type != "cpu" or torch.compiler.is_compiling() or bool(tokens.all()):
        return None
    return tokens.flatten().nonzero()[:, 0]
