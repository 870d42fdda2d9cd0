"""Run a recipe's frozen image encoder once over its pictures, so that training never runs it."""

from __future__ import annotations

import logging
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
from qformers.data.feature_writing import create_store, int8_error, write_shards
from qformers.data.features import FeatureStore
from qformers.data.images import load_image
from qformers.data.transforms import evaluation_transform, train_transform, transform_for
from qformers.errors import ConfigError, DataError
from qformers.training.config import TrainConfig
from qformers.training.setup import build_encoder, feature_key, open_sources, stored_pictures

ENCODER_BATCH = 64

logger = logging.getLogger(__name__)


def precompute(config: TrainConfig) -> FeatureStore:
    """Write the store at `data.features` for the pictures of `data.train`; one that was begun is finished.

    View 0 of a picture is its evaluation transform, the other `data.feature_views` - 1 are random crops.
    The encoder runs in the run's precision. Under `torchrun` the processes share the shards; a complete store is
    checked, and what is damaged made again.

    Raises:
        ConfigError: `data.features` is not set, or the encoder and the transform do not fit.
        DataError: the pictures cannot be opened, or the store does not fit on the disk.
    """
    if config.data.features is None:
        raise ConfigError("data.features is not set: give the folder that the features are to be written to")
    processes = PartialState(cpu=not torch.accelerator.is_available())
    records = stored_pictures(config, open_sources(config, config.data.train))
    encoder = build_encoder(config).to(processes.device)
    transform = transform_for(encoder, config.data.transform)
    views = PictureViews(records, transform, config.data.feature_views, config.seed)
    key = feature_key(config, encoder, records)
    with processes.main_process_first():
        store = create_store(config.data.features, key, len(records), encoder.patches, encoder.dim)

    def pixel_values(batches: list[range]) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        yield from DataLoader(
            views,
            batch_sampler=[list(rows) for rows in batches],
            num_workers=config.data.workers,
            multiprocessing_context="spawn" if config.data.workers else None,
        )

    write_shards(
        store,
        pixel_values,
        lambda pixels: encoder(pixels.to(processes.device)),
        processes.process_index,
        processes.num_processes,
        ENCODER_BATCH,
    )
    processes.wait_for_everyone()
    if store.dtype == "int8" and processes.is_main_process:
        logger.info("%s: int8 rows differ from the encoder's output by %.2g %%", store.folder, 100 * int8_error(store))
    return FeatureStore.open(config.data.features, key)


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
