"""Run a recipe's frozen image encoder once over its pictures, so that training never runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qformers.data.config import TransformConfig
from qformers.data.dataset import Records
from qformers.data.features import FeatureStore, write_features
from qformers.data.images import load_image
from qformers.data.transforms import evaluation_transform, train_transform, transform_for
from qformers.errors import ConfigError, DataError
from qformers.training.config import TrainConfig
from qformers.training.setup import build_encoder, feature_key, open_sources

ENCODER_BATCH = 64


def precompute(config: TrainConfig) -> FeatureStore:
    """Write the store at `data.features` for the pictures of `data.train`; one that was begun is finished.

    View 0 of a picture is its evaluation transform, the other `data.feature_views` - 1 are random crops.
    The encoder runs in the run's precision.

    Raises:
        ConfigError: `data.features` is not set, or the encoder and the transform do not fit.
        DataError: the pictures cannot be opened, or the store does not fit on the disk.
    """
    if config.data.features is None:
        raise ConfigError("data.features is not set: give the folder that the features are to be written to")
    device = PartialState().device
    records = open_sources(config.data.train)
    encoder = build_encoder(config).to(device)
    transform = transform_for(encoder, config.data.transform)
    views = PictureViews(records, transform, config.data.feature_views, config.seed)

    def pixel_values(start: int) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        yield from DataLoader(
            views,
            sampler=range(start, len(views)),
            batch_size=ENCODER_BATCH,
            num_workers=config.data.workers,
            multiprocessing_context="spawn" if config.data.workers else None,
        )

    return write_features(
        config.data.features,
        feature_key(config, encoder, records),
        records=len(records),
        patches=encoder.patches,
        dim=encoder.dim,
        batches=pixel_values,
        encode=lambda pixels: encoder(pixels.to(device)),
    )


@dataclass(frozen=True)
class PictureViews(Dataset):
    """Every view of every picture, in the order of the store (record x views + view). NaN: undecodable."""

    records: Records
    transform: TransformConfig
    views: int
    seed: int

    def __len__(self) -> int:
        return len(self.records) * self.views

    def __getitem__(self, row: int) -> Float[Tensor, "3 height width"]:
        index, view = divmod(row, self.views)
        stored = self.records[index]["image"]
        try:
            image = load_image(stored["bytes"] if stored["bytes"] is not None else stored["path"])
        except DataError:
            # The store keeps the mark; training names the picture, counts it and leaves it out.
            return torch.full((3, self.transform.image_px, self.transform.image_px), torch.nan)
        if view == 0:
            return evaluation_transform(image, self.transform)
        return train_transform(image, self.transform, np.random.default_rng((self.seed, row)))
