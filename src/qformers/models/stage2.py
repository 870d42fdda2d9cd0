"""The stage-2 model: what the Q-Former sees becomes soft visual prompts of a frozen language model."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qformers.errors import CheckpointError
from qformers.models.bridges import Bridge
from qformers.models.language import LanguageModel
from qformers.models.qformer import QFormer
from qformers.models.reader import ImageReader, at_least_fp32
from qformers.models.vision import VisionEncoder


class Stage2Model(ImageReader):
    """Built from its parts (`presets.build_stage2` has the sizes). The language model is frozen.

    The Q-Former keeps its text branch, which captioning does not use and question answering needs; stage 1's heads
    (ITC, ITM, ITG) are left out. With `reads_instructions` the Q-Former was trained to read, as text, what the language
    model is asked (InstructBLIP, arXiv 2305.06500, section 2.3): `visual_prompts` is then to be given that text too.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        vision_norm: nn.LayerNorm,
        qformer: QFormer,
        language_projection: nn.Linear,
        language_model: LanguageModel,
        reads_instructions: bool = False,
    ) -> None:
        super().__init__(vision_encoder, vision_norm, qformer)
        self.language_projection = language_projection
        self.language_model = language_model
        self.reads_instructions = reads_instructions

    def visual_prompts(
        self,
        patch_embeds: Float[Tensor, "images patches vision_dim"],
        instructions: tuple[Int[Tensor, "images tokens"], Bool[Tensor, "images tokens"]] | None = None,
    ) -> Float[Tensor, "images queries llm_dim"]:
        """`language_projection` of the query outputs, in place of word embeddings.

        Args:
            instructions: ids and mask of a text for each image that the queries read with it; None: the image alone.
        """
        memory = self.remember(patch_embeds)
        outputs = self.query(memory) if instructions is None else self.query_with_text([memory], *instructions)
        return self.language_projection(outputs)

    def text_branch(self) -> Iterator[nn.Module]:
        """The parts of the Q-Former that only text passes through: unused, and so untrained, by captioning."""
        yield self.qformer.text_embeddings
        for block in self.qformer.blocks:
            yield from (block.get_submodule("text_ffn"), block.get_submodule("text_ffn_norm"))


class BridgedModel(Stage2Model):
    """A stage-2 model whose bridge is no Q-Former (`bridges.py`), to compare with one at as many visual tokens.

    It captions and answers as any other. There are no queries to look at and no text branch, so what asks for its
    `qformer` finds none.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        vision_norm: nn.LayerNorm,
        bridge: Bridge,
        language_projection: nn.Linear,
        language_model: LanguageModel,
    ) -> None:
        nn.Module.__init__(self)  # not the parent's, which takes a Q-Former
        self.vision_encoder = vision_encoder
        self.vision_norm = vision_norm
        self.bridge = bridge
        self.language_projection = language_projection
        self.language_model = language_model
        self.reads_instructions = False

    def visual_prompts(
        self,
        patch_embeds: Float[Tensor, "images patches vision_dim"],
        instructions: tuple[Int[Tensor, "images tokens"], Bool[Tensor, "images tokens"]] | None = None,
    ) -> Float[Tensor, "images queries llm_dim"]:
        """`language_projection` of what the bridge makes of the pictures. Raises CheckpointError for instructions."""
        if instructions is not None:
            raise CheckpointError("this model's bridge is no Q-Former and reads no text")
        dtype = self.vision_norm.weight.dtype
        return self.language_projection(self.bridge(self.vision_norm(at_least_fp32(patch_embeds).to(dtype))))

    def text_branch(self) -> Iterator[nn.Module]:
        """There is none."""
        yield from ()
