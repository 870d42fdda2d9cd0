"""Another image encoder: python examples/swap_in_siglip.py --encoder google/siglip-base-patch16-224

Any CLIP, SigLIP, DINOv2 or EVA of Hugging Face's, or a convolutional net (docs/own_models.md). It is frozen, so its
features are computed once here and training never runs it.
"""

from __future__ import annotations

from jsonargparse import auto_cli

from qformers.data.config import SourceConfig, TransformConfig
from qformers.models.config import ModelConfig, PresetName
from qformers.models.vision import build_vision_encoder
from qformers.training.config import DataConfig, OptimiserConfig, TrainConfig
from qformers.training.features import precompute
from qformers.training.loop import train


def main(
    encoder: str = "google/siglip-base-patch16-224",
    pictures: str = "pictures",
    output: str = "runs/siglip",
    steps: int = 300,
    batch_size: int = 32,
    preset: PresetName = "small",
) -> None:
    """See what the encoder gives, compute its features, train on them."""
    built = build_vision_encoder(encoder)
    print(f"{built.family}: layer {built.layer}, {built.patches} patches of {built.dim} numbers at {built.image_px} px")

    config = TrainConfig(
        output=output,
        data=DataConfig(
            train=[SourceConfig(pictures)],
            features=f"{output}_features",
            feature_views=2,
            batch_size=batch_size,
            workers=0,
            transform=TransformConfig(image_px=built.image_px, flip=False),
        ),
        model=ModelConfig(encoder, text_encoder="sentence-transformers/all-MiniLM-L6-v2", preset=preset, num_queries=8),
        optimiser=OptimiserConfig(lr=4e-4, text_lr_scale=0.1, warmup_steps=steps // 10),
        steps=steps,
        log_every_steps=10,
    )
    store = precompute(config)
    print(f"{store.records} pictures, {store.views} views of each in {config.data.features}")
    print(train(config).model)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
