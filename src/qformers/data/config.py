"""What a user may choose about data. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qformers.errors import ConfigError

AnswersAs = Literal["sampled", "weighted"]
Format = Literal["auto", "jsonl", "json", "csv", "parquet", "coco", "karpathy", "imagefolder", "webdataset"]


@dataclass(frozen=True)
class SourceConfig:
    """Where pictures and captions come from."""

    path: str
    """A file, a folder or a pattern of shards ("train-*.tar")."""
    format: Format = "auto"
    """How to read it; auto goes by the names and the content of the files."""
    images: str | None = None
    """The folder that relative image paths start from; default: the caption file's own."""
    split: str | None = None
    """A Karpathy split, a sub-folder, or the rows whose "split" column says so."""
    image_column: str = "image"
    """Left at its default, "file_name" is found too."""
    caption_column: str = "caption"
    """Left at its default, "captions" and "text" are found too."""
    id_column: str = "image_id"
    """Same id, same picture. Without such a column the picture's path is its id."""
    annotations: str | None = None
    """Of VQAv2 and OK-VQA, the file of answers; `path` is that of the questions."""
    image_name: str | None = None
    """Of questions about pictures that are only numbered, how a file is named, such as "{id:0>12}.jpg"; default:
    "COCO_<subset>_{id:0>12}.jpg" where the file of questions names a subset (VQAv2, OK-VQA), else "{id}.jpg" (GQA)."""
    stream: bool = False
    """To train: read tars and parquet files where they are and copy nothing. `path` may be a URL (s3://, hf://, …)."""
    weight: float | None = None
    """To train: this source's share of every batch, or of the batches (`data.mix_by`), relative to the others'; all of
    them need one then. Without weights the sources are read as one."""

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise ConfigError(f"{self.path}: weight is {self.weight}: it must be above 0, or leave the source out")


@dataclass(frozen=True)
class TransformConfig:
    """How pictures become tensors. Hashable, of plain numbers only: it is part of a feature store's key."""

    image_px: int = 224
    """Side of the square pictures that the encoder sees."""
    mean: tuple[float, float, float] | None = None
    """Of the red, green and blue channel on the 0–1 scale; default: what the image encoder was trained with."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the channels; default: the image encoder's."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Range of the training crop's share of the picture's area (LAVIS)."""
    flip: bool = True
    """Mirror half of the training crops. Turn it off when captions say "left" and "right"."""

    def __post_init__(self) -> None:
        if self.image_px < 1:
            raise ConfigError(f"image_px is {self.image_px}: a picture needs at least 1 pixel")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_scale is ({low}, {high}): it must satisfy 0 < low <= high <= 1")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}: pictures are divided by it, so it must be above 0")
