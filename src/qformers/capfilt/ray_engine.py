"""The ray engine: the same stages as actors of a cluster, with Ray Data between them.

Ray Data streams: a part goes on to the next stage as soon as it is done, and a stage that is ahead waits when what it
has made fills its share of the object store. A worker that dies is started again, and its parts are done again.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
import ray.exceptions
import torch

from qformers.capfilt.captioner import open_captioner
from qformers.capfilt.config import WorkConfig
from qformers.capfilt.pictures import Pictures
from qformers.capfilt.ranker import open_ranker
from qformers.capfilt.stages import (
    CaptionStage,
    FailedPart,
    Plan,
    RankedPart,
    RankStage,
    ReadStage,
    attempt,
    open_judge,
)
from qformers.models.vision import one_line
from qformers.training.loop import keep_freed_memory

MAX_BLOCKS = 10_000  # beyond so many parts, several of them are one task of Ray's
LOCAL_STORE_BYTES = 512 * 1024**2  # some dozens of parts, of which a few are under way

logger = logging.getLogger(__name__)

Row = dict[str, bytes]  # one part, pickled: Ray need not know what it is made of


class ReadActor:
    """`ReadStage` with the source opened once."""

    def __init__(self, plan: Plan) -> None:
        self.stage = ReadStage(plan, Pictures(plan.source))

    def __call__(self, row: Row) -> Row:
        return _through(self.stage, row)


class CaptionActor:
    """`CaptionStage` with the captioner loaded once."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        keep_freed_memory()
        self.stage = CaptionStage(plan, open_captioner(plan.captioner, plan.sampling, _device()))

    def __call__(self, row: Row) -> Row:
        return _through(self.stage, row)


class RankActor:
    """`RankStage` with the ranker and the judge loaded once."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        keep_freed_memory()
        ranker = open_ranker(plan.ranker, _device())
        self.stage = RankStage(plan, ranker, open_judge(plan.ranking.judge, plan.ranker, ranker, _device()))

    def __call__(self, row: Row) -> Row:
        return _through(self.stage, row)


def run_ray(plan: Plan, shards: list[int], work: WorkConfig) -> Iterator[RankedPart | FailedPart]:
    """Parts of the shards as they are done, in any order. What a dying cluster leaves undone is missed at the end by
    the shards that are not done."""
    keys = [key for shard in shards for key in plan.keys(shard)]
    with _cluster(plan, work) as gpus:
        parts = ray.data.from_items(
            [{"part": pickle.dumps(key)} for key in keys], override_num_blocks=min(len(keys), MAX_BLOCKS)
        )
        parts = _stage(parts, ReadActor, plan, work.readers, 1, 0)
        parts = _stage(parts, CaptionActor, plan, work.captioners, plan.threads, int(gpus >= work.captioners))
        enough = gpus >= work.captioners + work.rankers
        parts = _stage(parts, RankActor, plan, work.rankers, plan.threads, int(enough))
        try:
            for row in parts.iter_rows():
                yield pickle.loads(row["part"])
        except ray.exceptions.RayError as error:
            logger.warning("ray: %s", one_line(error)[:300])


@contextmanager
def _cluster(plan: Plan, work: WorkConfig) -> Iterator[int]:
    """The cluster's number of GPUs while it is connected; one that was started here ends with the block."""
    # What Ray says of itself is for its own log folder.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    address = work.address or os.environ.get("RAY_ADDRESS", "local")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    needed = work.readers + plan.threads * (work.captioners + work.rankers)
    if address == "local":
        settings |= {"num_cpus": needed, "object_store_memory": LOCAL_STORE_BYTES, "include_dashboard": False}
    ray.init(address=address, **settings)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        there = ray.cluster_resources()
        if there.get("CPU", 0) < needed:
            logger.warning(
                "the cluster has %g CPUs now, the stages take %d: they wait for more", there.get("CPU", 0), needed
            )
        yield int(there.get("GPU", 0))
    finally:
        ray.shutdown()


def _stage(parts: ray.data.Dataset, actor: Any, plan: Plan, size: int, cpus: int, gpus: int) -> ray.data.Dataset:
    """`parts` through a pool of `size` actors, each with so many of the cluster's CPUs and GPUs."""
    pool: Any = ray.data.ActorPoolStrategy(size=size)
    return parts.map(actor, fn_constructor_args=(plan,), compute=pool, num_cpus=cpus, num_gpus=gpus)


def _through(stage: Any, row: Row) -> Row:
    return {"part": pickle.dumps(attempt(stage, pickle.loads(row["part"])), pickle.HIGHEST_PROTOCOL)}


def _device() -> str:
    """Of an actor that Ray gave a GPU, that one."""
    return "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
