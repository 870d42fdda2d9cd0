"""The documentation's figures, drawn from the code itself: python docs/figures.py

The masks are those that `models/masks.py` returns. Sizes and parameters in the architecture are counted on the paper's
models, built on the meta device, so that neither can disagree with what is trained.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, OPTConfig

from qformers.models.config import ModelConfig
from qformers.models.language import LanguageModel
from qformers.models.masks import Mask, bidirectional_mask, causal_mask, unimodal_mask
from qformers.models.presets import build_stage1, build_stage2
from qformers.models.qformer import Block
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model
from qformers.models.vision import VisionEncoder

FOLDER = Path(__file__).parent / "images"
WORDS = ["[CLS]", "a", "cat", "[SEP]", "[PAD]"]
QUERIES = 4
MASKS = {"ITC": unimodal_mask, "ITG": causal_mask, "ITM": bidirectional_mask}
MEANING = {"ITC": "queries and text apart", "ITG": "text reads queries and earlier text", "ITM": "all read all"}
INK, FROZEN, TRAINED, PALE = "#343a40", "#8fb5ee", "#f0a84a", "#e9ecef"


def mask_of(objective: str) -> Mask:
    """The mask of an objective for `QUERIES` queries and `WORDS`, of which the last is padding."""
    real = torch.tensor([[word != "[PAD]" for word in WORDS]])
    return MASKS[objective](QUERIES, real)


def draw_masks() -> Figure:
    """The three masks side by side: a filled cell says that the row may attend to the column."""
    names = [f"q{number + 1}" for number in range(QUERIES)] + WORDS
    figure = Figure(figsize=(9.6, 3.7), layout="constrained", facecolor="white")
    for axes, objective in zip(figure.subplots(1, len(MASKS)), MASKS, strict=True):
        words = ["[DEC]" if name == "[CLS]" and objective == "ITG" else name for name in names]
        for row, column in mask_of(objective)[0, 0].nonzero().tolist():
            colour = FROZEN if max(row, column) < QUERIES or min(row, column) >= QUERIES else TRAINED
            axes.add_patch(matplotlib.patches.Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white"))
        axes.set(xlim=(0, len(names)), ylim=(len(names), 0), aspect="equal")
        axes.set_xticks([place + 0.5 for place in range(len(names))], words, rotation=90)
        axes.set_yticks([place + 0.5 for place in range(len(names))], words)
        axes.set_title(f"{objective}: {MEANING[objective]}", fontsize=9, color=INK)
        axes.axhline(QUERIES, color=INK, linewidth=0.8)
        axes.axvline(QUERIES, color=INK, linewidth=0.8)
        axes.tick_params(length=0, labelsize=8, colors=INK)
        axes.spines[:].set_color(PALE)
    figure.supylabel("reads", fontsize=9, color=INK)
    figure.supxlabel("is read", fontsize=9, color=INK)
    return figure


def paper_models() -> tuple[Stage1Model, Stage2Model]:
    """Both stages around CLIP's ViT-L/14 and OPT-2.7B, without numbers in them."""
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, patch_size=14
    )
    opt = OPTConfig(
        hidden_size=2560, num_hidden_layers=32, ffn_dim=10240, num_attention_heads=32, word_embed_proj_dim=2560
    )
    described = {"config": clip.to_dict(), "layer": 23, "image_px": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = ModelConfig(start_from_text_encoder=False)
    with torch.device("meta"):
        encoder = VisionEncoder.from_description({**described, "dtype": "float32"})
        speaker = LanguageModel(AutoModelForCausalLM.from_config(opt), end_id=2, pad_id=1)
        return build_stage1(config, 30523, encoder), build_stage2(config, 30523, encoder, speaker)


def draw_architecture() -> Figure:
    """What is frozen, what is trained, and what goes from one part to the next."""
    stage1, stage2 = paper_models()
    encoder, qformer, speaker = stage1.vision_encoder, stage1.qformer, stage2.language_model
    dim = qformer.query_tokens.shape[1]
    figure = Figure(figsize=(9.6, 4.4), facecolor="white")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, 96), ylim=(0, 44))
    axes.axis("off")
    _box(axes, 1, 16, 17, 12, FROZEN, f"image encoder, frozen\nlayer {encoder.layer} is read\n{_millions(encoder)}")
    _box(axes, 23, 18, 10, 8, TRAINED, "vision_norm")
    _draw_blocks(axes, 38, [block for block in qformer.blocks if isinstance(block, Block)])
    axes.text(50, 34, f"Q-Former, {_millions(qformer)}", ha="center", fontsize=9, color=INK)
    axes.text(50, 31.6, f"{qformer.num_queries} queries and text, {dim} wide", ha="center", fontsize=8, color=INK)
    heads = {
        "ITC: vision_projection,\ntext_projection": stage1.vision_projection.out_features,
        "ITM: itm_head": stage1.itm_head.out_features,
        "ITG: itg_head": stage1.qformer.vocab_size,
    }
    for number, (name, width) in enumerate(heads.items()):
        _box(axes, 70, 36 - 6.5 * number, 25, 5.5, TRAINED, f"{name} → {width}")
        _arrow(axes, (62, 25.5 - 1.5 * number), (70, 38.7 - 6.5 * number))
    axes.text(82.5, 42.6, "stage 1", ha="center", fontsize=9, color=INK)
    _box(axes, 70, 10, 25, 5, TRAINED, f"language_projection → {speaker.dim}")
    _box(axes, 70, 1, 25, 6, FROZEN, f"language model, frozen\n{_millions(speaker)}")
    axes.text(82.5, 16.2, "stage 2", ha="center", fontsize=9, color=INK)
    _arrow(axes, (62, 20), (70, 12.5))
    _arrow(axes, (82.5, 10), (82.5, 7))
    _arrow(axes, (18, 22), (23, 22))
    _arrow(axes, (33, 22), (38, 22))
    axes.text(20.5, 29, f"{encoder.patches} patches,\n{encoder.dim} wide", ha="center", fontsize=8, color=INK)
    axes.text(66, 10.6, f"{qformer.num_queries} × {dim}", ha="center", fontsize=8, color=INK)
    return figure


def _draw_blocks(axes: Axes, left: float, blocks: list[Block]) -> None:
    """One column for each block; those that read the picture have a third cell."""
    for number, block in enumerate(blocks):
        x = left + 2 * number
        for y, shown in ((22, True), (18, block.cross_attention is not None), (14, True)):
            colour = TRAINED if shown else PALE
            axes.add_patch(matplotlib.patches.Rectangle((x, y), 1.7, 3.5, facecolor=colour, edgecolor="white"))
    for y, name in ((26.6, "self-attention, of queries and text"), (11.6, "feed-forward: one of queries, one of text")):
        axes.text(left + len(blocks), y, name, ha="center", fontsize=8, color=INK)
    reading = sum(block.cross_attention is not None for block in blocks)
    axes.text(
        left + len(blocks),
        8.8,
        f"{len(blocks)} blocks; in {reading} the queries read the picture\n(middle row: cross-attention)",
        ha="center",
        va="top",
        fontsize=8,
        color=INK,
    )


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.8", facecolor=colour, linewidth=0)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=INK, linewidth=0.9))


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.0f} M parameters"


def main(folder: Path = FOLDER) -> None:
    """Write masks.svg and architecture.svg into `folder`; the same code and matplotlib write the same bytes."""
    for name, figure in (("masks", draw_masks()), ("architecture", draw_architecture())):
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qformers"}):
            FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
