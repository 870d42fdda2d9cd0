"""Stage 1 on a folder of captioned pictures: python examples/train_on_a_folder.py --pictures pictures

The folder holds metadata.csv (file_name,text) beside its pictures. A small Q-Former on a small image encoder, so that
a laptop is enough; the recipes in recipes/ are the same settings as files.
"""

from __future__ import annotations

from jsonargparse import auto_cli

import qformers
from qformers.data.config import SourceConfig, TransformConfig
from qformers.data.sources import open_source, picture_of
from qformers.models.config import ModelConfig, PresetName
from qformers.training.config import DataConfig, OptimiserConfig, TrainConfig
from qformers.training.loop import train


def main(
    pictures: str = "pictures",
    output: str = "runs/folder",
    steps: int = 300,
    batch_size: int = 32,
    preset: PresetName = "small",
) -> None:
    """Train, then look at one of the pictures with the model."""
    source = SourceConfig(pictures)
    config = TrainConfig(
        output=output,
        data=DataConfig(
            train=[source],
            batch_size=batch_size,
            workers=0,
            transform=TransformConfig(image_px=126, flip=False),
        ),
        model=ModelConfig(
            vision_encoder="facebook/dinov2-small",
            text_encoder="sentence-transformers/all-MiniLM-L6-v2",
            preset=preset,
            num_queries=8,
            query_start="words",  # keeps the queries apart in a short run, and so does the next
            standardise_patches=True,
        ),
        optimiser=OptimiserConfig(lr=4e-4, text_lr_scale=0.1, warmup_steps=steps // 10),
        steps=steps,
        log_every_steps=10,
    )
    run = train(config)

    model = qformers.load(run.model)
    records = open_source(source)
    captions = [record["captions"][0] for record in records.select(range(8))]
    picture = picture_of(records[0])
    for caption, match in zip(captions, model.match(picture, captions), strict=True):
        print(f"{match:.3f}  {caption}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
