"""What a user may choose about cleaning captions. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qformers.errors import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How captions are written. The defaults are BLIP's (arXiv 2201.12086): nucleus sampling."""

    captions: int = 10
    """Captions sampled of each picture (BLIP-2, section 3.3: 10)."""
    prompt: str | None = None
    """What every caption goes on from; default: what the captioner was trained with."""
    top_p: float = 0.9
    """Nucleus: draw from the likeliest tokens that together have this probability."""
    temperature: float = 1.0
    """Below 1 likelier tokens are drawn more often."""
    max_new_tokens: int = 20
    """A caption is cut off after so many tokens."""
    min_new_tokens: int = 5
    """No caption ends before."""
    seed: int = 0
    """With a picture's id it decides its captions, whatever the engine, the batch and the order."""


@dataclass(frozen=True)
class RankingConfig:
    """Which captions are kept."""

    keep: int = 2
    """Best captions kept of each picture, written or found (BLIP-2: 2)."""
    min_score: float | None = None
    """Drop captions that the ranker scores lower; default: none is dropped for that."""
    judge: str | None = None
    """Stage-1 model whose ITM head drops captions that it calls unmatched (BLIP's filter); may be the ranker."""
    min_match: float = 0.5
    """Probability of a match below which the judge drops a caption."""
    script: str = "latin"
    """Web captions mostly in another script are dropped unranked (latin, cyrillic, cjk, arabic, …); any: none is."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"keep is {self.keep}: at least 1 caption must be kept")
        if not 0 <= self.min_match <= 1:
            raise ConfigError(f"min_match is {self.min_match}: a probability is between 0 and 1")


@dataclass(frozen=True)
class WorkConfig:
    """How the work is cut up and who does it. The engine and the number of processes do not change a byte; another
    `batch_size`, `threads` or kind of device may turn a near-tie or the last digit of a score."""

    engine: Literal["local", "ray"] = "local"
    """local: one process per device; ray: reading, captioning and ranking as stages over a cluster."""
    devices: list[str] | None = None
    """local: one process for each, such as [cuda:0, cuda:1] or [cpu, cpu]; default: every GPU, or one process."""
    captioners: int = 1
    """ray: actors that caption, on a GPU each where the cluster has one."""
    rankers: int = 1
    """ray: actors that rank, on a GPU each where the cluster has more than the captioners take."""
    address: str | None = None
    """ray: the cluster; default: $RAY_ADDRESS, or one on this machine for as long as it takes."""
    batch_size: int = 16
    """Pictures at a time."""
    readers: int = 2
    """Threads (local, of each process) or actors (ray) that decode pictures."""
    threads: int | None = None
    """CPU threads of each model; default: half of this machine's cores."""
    attempts: int = 3
    """A shard that failed so often is named, and the command fails."""

    def __post_init__(self) -> None:
        for name in ("captioners", "rankers", "batch_size", "readers", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.devices is not None and not self.devices:
            raise ConfigError("devices is empty: name at least one, such as [cpu], or leave it out")


@dataclass(frozen=True)
class OutputConfig:
    """Where captions go and in what form."""

    output: str
    """Folder of the shards, their accounts and report.html; the same command goes on there."""
    shard_format: Literal["jsonl", "webdataset"] = "jsonl"
    """jsonl: captions with the paths of the pictures; webdataset: tars with the pictures in them."""
    shard_pictures: int = 1024
    """Pictures of a shard: what a kill costs at most, in each process."""

    def __post_init__(self) -> None:
        if self.shard_pictures < 1:
            raise ConfigError(f"shard_pictures is {self.shard_pictures}: must be at least 1")
