"""Images a second of both stages at full size on a GPU: ViT-g, BLIP-2's Q-Former and OPT-2.7B, all random, in bf16.

    python benchmarks/gpu.py --output runs/gpu

Stage 1 with ViT-g and from given features, as it is, compiled, and as the plain authors' step; stage 2 with
OPT-2.7B, both ways. Of each: images a second (median of the steps after the first few), the share of this GPU's speed
in one large matrix product, peak memory. The optimiser's step is left out on all sides. A public run of the authors'
code had 36 images a second on each A6000 in stage 1 at a batch of 128, and 51.5 in stage 2 with OPT-2.7B.

`--device cpu --toy` runs the same at toy size, to see that it works (minutes,
most of them the compiler's).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from full_size import COCO_TOKENS, GivenFeatures, captions, next_row_negatives, stage1_model, trimmed_batch
from measure import flops
from plain_stage1 import plain_losses
from torch import Tensor, nn
from transformers import Blip2VisionConfig, OPTConfig, OPTForCausalLM

from qformers.data.batch import IGNORED_LABEL, Batch
from qformers.models.config import ModelConfig, PresetName
from qformers.models.freezing import freeze
from qformers.models.language import LanguageModel
from qformers.models.presets import build_stage2, preset_shape
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model
from qformers.models.vision import VisionEncoder
from qformers.objectives.config import Stage1LossConfig
from qformers.objectives.itm import HardNegatives
from qformers.objectives.lm import Stage2Objective
from qformers.objectives.stage1 import Stage1Objective
from qformers.training.scaling import compile_layers

WARM_UP, PRODUCT_SIDE = 3, 8192
VIT_G = Blip2VisionConfig()  # 39 layers of 1408
OPT = OPTConfig(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560)
TOY_VIT = Blip2VisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56
)
TOY_OPT = OPTConfig(
    hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, vocab_size=500
)
START, LAST_WORD = 2, 490


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --device cpu --toy tries the script at toy size")
    bench = Bench(torch.device(options.device), options.batch, options.steps, options.toy)
    results = {**stage1(bench), **stage2(bench)}
    results = {"device": bench.name(), "batch": options.batch, "torch": torch.__version__, "runs": results}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


class Bench:
    """Where is measured, and how."""

    def __init__(self, device: torch.device, batch: int, steps: int, toy: bool) -> None:
        self.device, self.batch, self.steps, self.toy = device, batch, steps, toy
        self.preset: PresetName = "tiny" if toy else "blip2"
        side = 256 if toy else PRODUCT_SIDE
        left, right = torch.randn(2, side, side, device=device).bfloat16()
        self.fastest = 2 * side**3 / min(self._seconds(lambda: torch.mm(left, right)) for _ in range(20))

    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def measure(self, model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
        """Forward and backward passes of `loss` over one batch."""

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                value = loss()
            value.backward()

        for _ in range(WARM_UP):
            step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = [self._seconds(step) for _ in range(self.steps)]
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "images_per_second": self.batch / median(seconds),
            "seconds": {"median": median(seconds), "min": min(seconds), "max": max(seconds)},
            "peak_bytes": peak,
            "matrix_speed": self.fastest,
            "work": step,
        }

    def counted(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same with its work by torch's counter, which compiled code hides."""
        work = flops(row.pop("work"))
        return {**row, "flops": work, "peak_fraction": work / row["seconds"]["median"] / row["matrix_speed"]}

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def stage1(bench: Bench) -> dict[str, Any]:
    """From pixels and from features: ours, compiled, and plain."""
    found = {}
    ids, mask = (part.to(bench.device) for part in captions(bench.batch))
    negatives = HardNegatives(
        **{name: value.to(bench.device) for name, value in vars(next_row_negatives(bench.batch)).items()}
    )
    for given in (False, True):
        encoder = vit_g(bench)
        print("stage 1 from", "features" if given else "pixels", flush=True)
        shown = trimmed_batch(ids, mask, *seen(bench, encoder, given)).to(bench.device)
        model = stage1_model(GivenFeatures(encoder.dim) if given else encoder, preset_shape(bench.preset)).to(
            bench.device
        )
        name = "stage1_features" if given else "stage1_vit_g"
        objective = Stage1Objective(model, Stage1LossConfig())
        ours = bench.counted(bench.measure(model, lambda: objective(shown, negatives).total))  # noqa: B023
        plain = bench.counted(bench.measure(model, lambda: plain_loss(model, shown, ids, mask, negatives)))  # noqa: B023
        compile_layers(model)
        compiled = bench.measure(model, lambda: objective(shown, negatives).total)  # noqa: B023
        compiled.pop("work")
        found |= {name: ours, f"{name}_plain": plain, f"{name}_compiled": compiled}
    return found


def plain_loss(model: Stage1Model, shown: Batch, input_ids: Tensor, attention_mask: Tensor, negatives: Any) -> Tensor:
    """The authors' step on the same pictures or features, captions padded to 32."""
    features = shown.patch_embeds if shown.pixel_values is None else model.vision_encoder(shown.pixel_values)
    return torch.stack(list(plain_losses(model, features, input_ids, attention_mask, negatives).values())).sum()


def stage2(bench: Bench) -> dict[str, Any]:
    """From pixels and from features, through the frozen language model."""
    found = {}
    opt = OPTForCausalLM(TOY_OPT if bench.toy else OPT).to(torch.bfloat16)
    language_model = LanguageModel(opt, end_id=START, pad_id=1)
    for given in (False, True):
        encoder = vit_g(bench)
        print("stage 2 from", "features" if given else "pixels", flush=True)
        batch = captioned(bench, encoder, given)
        config = ModelConfig(preset=bench.preset, start_from_text_encoder=False, dropout=0.0, attention_dropout=0.0)
        bridge = GivenFeatures(encoder.dim) if given else encoder
        model: Stage2Model = build_stage2(config, 30523, bridge, language_model).to(bench.device)
        objective = Stage2Objective(model)
        found["stage2_features" if given else "stage2_vit_g"] = bench.counted(
            bench.measure(model, lambda: objective(batch).total)  # noqa: B023
        )
    return found


def vit_g(bench: Bench) -> VisionEncoder:
    """EVA's ViT-g as BLIP-2 has it, frozen, random."""
    config = TOY_VIT if bench.toy else VIT_G
    described = {"config": config.to_dict(), "layer": config.num_hidden_layers, "image_px": config.image_size}
    encoder = VisionEncoder.from_description(
        {**described, "dtype": "bfloat16", "mean": [0.0] * 3, "std": [1.0] * 3}
    ).to(bench.device)
    freeze(encoder, "vision_encoder")
    return encoder


def seen(bench: Bench, encoder: VisionEncoder, given: bool) -> tuple[Tensor | None, Tensor | None]:
    """Features, or pixels."""
    if given:
        return torch.randn(bench.batch, encoder.patches, encoder.dim).bfloat16(), None
    return None, torch.randn(bench.batch, 3, encoder.image_px, encoder.image_px)


def captioned(bench: Bench, encoder: VisionEncoder, given: bool) -> Batch:
    """Pictures with captions as our loader gives them for a decoder-only language model."""
    lengths = torch.randint(*COCO_TOKENS, (bench.batch,))
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    input_ids = torch.randint(3, LAST_WORD, tuple(mask.shape))
    labels = input_ids.masked_fill(~mask, IGNORED_LABEL)
    labels[:, 0] = IGNORED_LABEL
    patch_embeds, pixel_values = seen(bench, encoder, given)
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        image_ids=torch.arange(bench.batch),
        names=tuple(map(str, range(bench.batch))),
        patch_embeds=patch_embeds,
        pixel_values=pixel_values,
    ).to(bench.device)


if __name__ == "__main__":
    main()
