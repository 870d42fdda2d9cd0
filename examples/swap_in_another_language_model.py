"""Another language model: python examples/swap_in_another_language_model.py --language_model google/flan-t5-base

Stage 2 from any stage-1 run. The language model stays frozen; decoder-only (OPT, Llama, Qwen, …) and encoder-decoder
(T5, BART) are both read from their config.
"""

from __future__ import annotations

import yaml
from jsonargparse import auto_cli

import qformers
from qformers.data.config import SourceConfig, TransformConfig
from qformers.models.config import LanguageConfig, ModelConfig
from qformers.training.config import DataConfig, OptimiserConfig, TrainConfig
from qformers.training.loop import train


def main(
    language_model: str = "google/flan-t5-base",
    start: str = "runs/mine",
    pictures: str = "pictures",
    output: str = "runs/other_language_model",
    steps: int = 300,
    batch_size: int = 32,
    picture: str = "pictures/0001.jpg",
) -> None:
    """Train stage 2 with the sizes of `start`, then caption a picture."""
    with open(f"{start}/config.yaml", encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    config = TrainConfig(
        output=output,
        stage=2,
        start=start,
        language=LanguageConfig(language_model, prompt="a photo of"),
        data=DataConfig(
            train=[SourceConfig(pictures)],
            batch_size=batch_size,
            workers=0,
            transform=TransformConfig(image_px=settings["data"]["transform"]["image_px"], flip=False),
        ),
        model=ModelConfig(**settings["model"]),
        optimiser=OptimiserConfig(warmup_steps=steps // 10),
        steps=steps,
        log_every_steps=10,
    )
    model = qformers.load(train(config).model)
    print(model.caption(picture, num_beams=3, min_new_tokens=2)[0])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
