"""Records → examples → batches, with every random choice a function of (seed, epoch, index) alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import datasets
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from qformers.data.batch import IGNORED_LABEL, Batch, BrokenImage
from qformers.data.images import load_image
from qformers.data.sampling import EpochSampler, MixtureSampler, Part, entropy_generator
from qformers.data.shards import RecordList, ShardRecords, image_number
from qformers.data.sources import picture_of
from qformers.data.text import clean_caption, pad
from qformers.data.transforms import TransformConfig, evaluation_transform, train_transform
from qformers.errors import ConfigError, DataError

Records = datasets.Dataset | RecordList


@runtime_checkable
class FeatureReader(Protocol):
    """Frozen features of each record: view 0 by the evaluation transform, the others of random crops."""

    @property
    def views(self) -> int: ...

    def read(self, index: int, view: int) -> Float[Tensor, "patches vision_dim"]: ...


@runtime_checkable
class CaptionEncoder(Protocol):
    """How a caption becomes ids: `CaptionTokenizer` for the Q-Former, `LanguageTokenizer` for a language model."""

    @property
    def pad_id(self) -> int: ...

    def encode_example(
        self, caption: str, generator: np.random.Generator | None
    ) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " label_tokens"] | None]:
        """`input_ids` and `labels` of one caption, not padded. Without a generator nothing is drawn."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """What batches are made of: `CaptionDataset`, or `QuestionDataset`."""

    @property
    def records(self) -> Records: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Any: ...

    def collate(self, examples: list[Any]) -> Batch: ...


@dataclass(frozen=True)
class Example:
    """One picture, as pixels or as precomputed features, with one caption's ids (not padded)."""

    input_ids: Int[Tensor, " tokens"]
    image_id: int
    name: str
    pixel_values: Float[Tensor, "3 height width"] | None = None
    patch_embeds: Float[Tensor, "patches vision_dim"] | None = None
    labels: Int[Tensor, " label_tokens"] | None = None


@dataclass(frozen=True)
class Captions:
    """Every caption of a data set, cleaned, with the position of its picture in `CaptionDataset.images`."""

    texts: list[str]
    text_to_image: Int[np.ndarray, " texts"]
    empty: list[str]  # names of the pictures whose captions were left out because nothing was left after cleaning


class CaptionDataset(TorchDataset):
    """Records of `open_source` as training examples, or picture by picture and caption by caption.

    `train` draws one caption, crop, flip and feature view per visit; otherwise a record shows its first
    caption and the evaluation transform. A picture that cannot be decoded, a caption that is empty after
    cleaning and one the tokenizer refuses give a BrokenImage, to be counted by BrokenTally.
    With `features`, no picture is opened; a row that the store refuses is a BrokenImage too.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: CaptionEncoder,
        transform: TransformConfig,
        train: bool,
        seed: int = 0,
        features: FeatureReader | None = None,
    ) -> None:
        is_table = isinstance(records, datasets.Dataset)
        self.records = records if features is None or not is_table else records.remove_columns("image")
        self.tokenizer = tokenizer
        self.transform = transform
        self.train = train
        self.seed = seed
        self.features = features
        self._table_ids: Int[np.ndarray, " records"] | None = None
        if is_table:
            ids = records.select_columns("image_id").with_format("arrow")[:]["image_id"]
            self._table_ids = ids.dictionary_encode().combine_chunks().indices.to_numpy().astype(np.int64)

    @property
    def image_ids(self) -> Int[np.ndarray, " records"]:
        """A number for each record, equal for records of the same picture. Of tables only: the ids of streamed records
        are not known before each is read."""
        assert self._table_ids is not None, "streamed records are trained on, not evaluated"
        return self._table_ids

    @property
    def table(self) -> datasets.Dataset:
        """The records, where they are a table and not streamed."""
        assert isinstance(self.records, datasets.Dataset), "streamed records are trained on, not evaluated"
        return self.records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Example | BrokenImage:
        """The example at `(epoch, index)`."""
        epoch, index = key
        try:
            record = self.records[index]
        except DataError as error:
            assert isinstance(self.records, RecordList)  # a table's rows are in memory
            return broken_image(self.records.place(index), error)
        generator = entropy_generator(self.seed, epoch, index)
        captions = record["captions"]
        if not captions:
            return BrokenImage(record["name"], "it has no caption")
        chosen = int(generator.integers(len(captions))) if self.train else 0
        caption = clean_caption(captions[chosen])
        if not caption:
            return BrokenImage(record["name"], f"caption {chosen} is empty after cleaning: {captions[chosen]!r}")
        try:
            input_ids, labels = self.tokenizer.encode_example(caption, generator if self.train else None)
            pictures = self._picture(index, record, generator if self.train else None)
        except DataError as error:
            return broken_image(record["name"], error)
        return Example(input_ids, self._image_id(index, record), record["name"], **pictures, labels=labels)

    def collate(self, examples: list[Example | BrokenImage]) -> Batch:
        """`collate` with this data set's padding."""
        return collate(examples, self.tokenizer.pad_id)

    def images(self) -> ImageView:
        """Every distinct picture once, for retrieval evaluation."""
        return ImageView(self)

    def captions(self, per_record: int | None = None) -> Captions:
        """Every caption of every record, or its first `per_record`; those of records that share an image id lead to
        the same picture."""
        texts, positions, empty = [], [], []
        order = {int(self.image_ids[index]): position for position, index in enumerate(self.first_records)}
        rows = self.table.select_columns(["captions", "name"]).to_list()
        for image_id, row in zip(self.image_ids, rows, strict=True):
            for caption in map(clean_caption, row["captions"][:per_record]):
                if caption:
                    texts.append(caption)
                    positions.append(order[int(image_id)])
                else:
                    empty.append(row["name"])
        return Captions(texts, np.array(positions, dtype=np.int64), empty)

    @property
    def first_records(self) -> Int[np.ndarray, " images"]:
        """For each distinct image id, in order of appearance, the index of its first record; if streamed, all."""
        if self._table_ids is None:
            return np.arange(len(self.records))
        return np.sort(np.unique(self.image_ids, return_index=True)[1])

    def _image_id(self, index: int, record: dict[str, Any]) -> int:
        return image_number(record["image_id"]) if self._table_ids is None else int(self._table_ids[index])

    def _picture(self, index: int, record: dict[str, Any], generator: np.random.Generator | None) -> dict[str, Tensor]:
        """Pixels or features, in a random view if there is a generator."""
        if self.features is not None:
            view = 0 if generator is None else int(generator.integers(self.features.views))
            return {"patch_embeds": self.features.read(index, view)}
        image = load_image(picture_of(record), record["name"])
        if generator is None:
            return {"pixel_values": evaluation_transform(image, self.transform)}
        return {"pixel_values": train_transform(image, self.transform, generator)}


class ImageView(TorchDataset):
    """A data set's distinct pictures, by the evaluation transform; `input_ids` are an empty caption's."""

    def __init__(self, dataset: CaptionDataset) -> None:
        self.dataset = dataset
        self.indices = dataset.first_records

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Example | BrokenImage:
        dataset = self.dataset
        index = int(self.indices[position])
        record = dataset.records[index]
        try:
            pictures = dataset._picture(index, record, None)
        except DataError as error:
            return broken_image(record["name"], error)
        no_caption, _ = dataset.tokenizer.encode_example("", None)
        return Example(no_caption, dataset._image_id(index, record), record["name"], **pictures)


def collate(examples: list[Example | BrokenImage], pad_id: int = 0) -> Batch:
    """One batch of the examples, text padded to its longest; broken pictures are listed, not batched.

    If all are broken the batch has length 0 and neither pixels nor features.
    """
    whole = [example for example in examples if isinstance(example, Example)]
    input_ids, attention_mask = pad([example.input_ids for example in whole], pad_id)
    pixels = [example.pixel_values for example in whole if example.pixel_values is not None]
    embeds = [example.patch_embeds for example in whole if example.patch_embeds is not None]
    labels = [example.labels for example in whole if example.labels is not None]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_ids=torch.tensor([example.image_id for example in whole], dtype=torch.int64),
        names=tuple(example.name for example in whole),
        pixel_values=torch.stack(pixels) if pixels else None,
        patch_embeds=torch.stack(embeds) if embeds else None,
        labels=pad(labels, IGNORED_LABEL)[0] if labels else None,
        broken=tuple(example for example in examples if isinstance(example, BrokenImage)),
    )


def make_loader(
    dataset: Trainable,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    shuffle_buffer: int = 0,
    together_column: str | None = None,
    whole_batches: bool = False,
) -> DataLoader:
    """Training batches up to `stop_step`: the same ones, in the same order, with any number of worker processes.

    Batches are those of `EpochSampler`, or of `MixtureSampler` if the sources have weights; `shuffle_buffer` is of
    streamed ones; `whole_batches` are of sources with weights. Records with the same value in `together_column` stay
    side by side, in one batch unless it is full.

    Without `stop_step` there is no end, and workers are then stopped in the middle of their work, which one may
    leave by aborting: its queue's thread can still be handing over a batch when its interpreter goes.

    Workers are spawned, not forked (a fork of a process that runs CUDA or tokenizer threads can hang), so a
    script that uses them needs the usual `if __name__ == "__main__"`.
    """
    records, buffer = dataset.records, shuffle_buffer
    parts = records.parts() if isinstance(records, RecordList) else [Part(0, len(records))]
    if together_column is not None:
        tables = records.sources if isinstance(records, RecordList) else [records]
        parts = [
            replace(part, groups=_groups(table, together_column)) for part, table in zip(parts, tables, strict=True)
        ]
    where = {"start_step": start_step, "stop_step": stop_step, "rank": rank, "world_size": world_size}
    if parts[0].weight is None:
        whole = parts[0]
        sampler = EpochSampler(
            whole.length, batch_size, seed, pieces=whole.pieces, buffer=buffer, groups=whole.groups, **where
        )
    else:
        sampler = MixtureSampler(parts, batch_size, seed, buffer=buffer, whole_batches=whole_batches, **where)
    return DataLoader(
        cast(TorchDataset, dataset),
        batch_sampler=sampler,
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers > 0 else None,
    )


def _groups(records: Records | ShardRecords, column: str) -> Int[np.ndarray, " records"]:
    """A number for each record, equal where the column is; records without a value are groups of one."""
    if not isinstance(records, datasets.Dataset):
        raise ConfigError(f"data.together_column is {column!r}: streamed records are read shard by shard, in no groups")
    if column not in records.column_names:
        raise DataError(f"no column {column!r} for data.together_column; there are: {', '.join(records.column_names)}")
    values = records.select_columns(column).with_format("arrow")[:][column].to_pylist()
    alone = [row if value is None else str(value) for row, value in enumerate(values)]
    numbers = {value: number for number, value in enumerate(dict.fromkeys(alone))}
    return np.array([numbers[value] for value in alone], dtype=np.int64)


def broken_image(name: str, error: DataError) -> BrokenImage:
    """The mark of a record that could not be used."""
    return BrokenImage(name, str(error).removeprefix(f"{name}: "))
