"""Which records make up which batch: a function of the seed and the number of the step, so a run resumes anywhere.

Nothing is carried from step to step: no shuffle buffer is filled and no position is kept, whatever is read from
where. So a run goes on in the middle of a shard, also with another number of processes or workers, and no record is
lost or seen twice within an epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from qformers.errors import ConfigError, DataError

LANES = 16  # of a streamed source: that many stretches of its shards are read side by side

Key = tuple[int, int]
"""Epoch and index of a record: what a data set is asked for."""


@dataclass(frozen=True)
class Part:
    """Records that are shuffled together: of one source, or of all.

    `pieces` are the lengths of its shards, whose records lie together and are read one after another; None for
    records that can be read in any order. `groups` has a number (from 0) for each such record; those of one number
    stay side by side.
    """

    first: int
    length: int
    pieces: Int[np.ndarray, " pieces"] | None = None
    weight: float | None = None
    groups: Int[np.ndarray, " records"] | None = None

    def lanes(self, batch_size: int) -> int:
        """In how many stretches an epoch's shards are laid side by side."""
        return 1 if self.pieces is None else math.gcd(batch_size, LANES)

    def order(self, generator: np.random.Generator, buffer: int, lanes: int) -> Int[np.ndarray, " records"]:
        """The record of each row of an epoch.

        Without `pieces`, a permutation, of groups if there are any. With them: the pieces are permuted and cut into
        `lanes` stretches; within a stretch a record moves by less than `buffer` places, as a shuffle buffer of that
        size would move it; row t is of stretch t modulo `lanes`.
        """
        if self.groups is not None:
            places = generator.permutation(self.groups.max() + 1)
            return self.first + np.argsort(places[self.groups], kind="stable")
        if self.pieces is None:
            return self.first + generator.permutation(self.length)
        places = generator.permutation(len(self.pieces))
        in_sequence = self.first + np.argsort(np.repeat(places, self.pieces), kind="stable")
        rows = np.empty(self.length, dtype=np.int64)
        for lane, stretch in enumerate(np.array_split(in_sequence, lanes)):
            moved = np.arange(len(stretch)) + generator.uniform(0, max(buffer, 1), len(stretch))
            rows[lane::lanes] = stretch[np.argsort(moved)]
        return rows


class EpochSampler:
    """Batches of (epoch, index), reshuffled each epoch as a function of (seed, epoch).

    The rows left over at the end of an epoch are dropped, as torch's `drop_last` does. `start_step` continues
    exactly where a run that took as many steps stopped; after `stop_step` steps in all (None: never) it ends.
    `batch_size` is of the whole step: process `rank`
    of `world_size` yields its equal slice of it, so what a step trains on does not depend on their number.
    Records in `pieces` or `groups` are drawn as `Part.order` says; a process then reads few of the pieces, and a group
    is in one batch unless the batch is full.
    Raises DataError if the data set is smaller than a batch, ConfigError if the slices are not equal.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        pieces: Int[np.ndarray, " pieces"] | None = None,
        buffer: int = 0,
        groups: Int[np.ndarray, " records"] | None = None,
    ) -> None:
        _check_slices(batch_size, world_size)
        if length < batch_size:
            raise DataError(f"the data set has {length} records, the batch size is {batch_size}: no batch can be full")
        self.part = Part(0, length, pieces, groups=groups)
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.rank = rank
        self.world_size = world_size
        self.buffer = buffer

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.part.length // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        lanes = self.part.lanes(self.batch_size)
        for epoch, of_epoch in itertools.groupby(
            _steps(self.start_step, self.stop_step), key=lambda step: step // self.steps_per_epoch
        ):
            order = self.part.order(entropy_generator(self.seed, epoch), self.buffer, lanes)
            for step in of_epoch:
                rows = np.arange(self.batch_size) + step % self.steps_per_epoch * self.batch_size
                keys = [(epoch, int(order[row])) for row in rows]
                yield _slice_of(keys, rows % lanes, self.rank, self.world_size)


class MixtureSampler:
    """Batches of (epoch, index) in which each part has its share by weight.

    Of every batch, to within a row, and in a random order: ITM, where it scores a fraction of the rows, scores some
    of each. With `whole_batches` of all batches instead: each batch is of one part alone, the one whose share is most
    behind.

    Each part goes through its own epochs, without end and with nothing left over: within one of them every record is
    seen once. The rest is as with `EpochSampler`.
    Raises ConfigError if the slices are not equal, or a part's share is less than one row of each batch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        buffer: int = 0,
        whole_batches: bool = False,
    ) -> None:
        _check_slices(batch_size, world_size)
        weights = np.array([part.weight for part in parts], dtype=np.float64)
        shares = weights / weights.sum()
        if shares.min() * batch_size < 1 and not whole_batches:
            rows = shares.min() * batch_size
            raise ConfigError(
                f"source {int(shares.argmin()) + 1} has {shares.min():.3g} of the weight, {rows:.2g} rows of a batch "
                f"of {batch_size}: it must be at least one, raise its weight or data.batch_size, or set "
                "data.mix_by to batches"
            )
        self.parts = parts
        self.shares = shares
        self.bounds = [0.0, *np.cumsum(shares)[:-1].tolist(), 1.0]
        self.batch_size = batch_size
        self.whole_batches = whole_batches
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.rank = rank
        self.world_size = world_size
        self.buffer = buffer

    def taken(self, number: int, step: int) -> int:
        """Rows of part `number` in all batches before `step`."""
        low, high = self.bounds[number : number + 2]
        return math.floor(high * step * self.batch_size) - math.floor(low * step * self.batch_size)

    def _rows(self) -> Iterator[list[range]]:
        """For each step, the rows of each part, counted from the start of its first epoch."""
        if not self.whole_batches:
            for step in _steps(self.start_step, self.stop_step):
                yield [
                    range(self.taken(number, step), self.taken(number, step + 1)) for number in range(len(self.parts))
                ]
            return
        turns = np.zeros(len(self.parts), dtype=np.int64)
        for step in _steps(0, self.stop_step):
            before = turns * self.batch_size
            turns[np.argmax(self.shares * (step + 1) - turns)] += 1
            if step >= self.start_step:
                yield [range(*rows) for rows in zip(before.tolist(), (turns * self.batch_size).tolist(), strict=True)]

    def __iter__(self) -> Iterator[list[Key]]:
        orders: dict[int, tuple[int, Int[np.ndarray, " records"]]] = {}
        lanes = [part.lanes(self.batch_size) for part in self.parts]
        for step, of_step in enumerate(self._rows(), self.start_step):
            keys, lane_of = [], []
            for number, (part, rows) in enumerate(zip(self.parts, of_step, strict=True)):
                for row in rows:
                    epoch, place = divmod(row, part.length)
                    if orders.get(number, (None,))[0] != epoch:
                        generator = entropy_generator(self.seed, epoch, number, 1)
                        orders[number] = epoch, part.order(generator, self.buffer, lanes[number])
                    keys.append((epoch, int(orders[number][1][place])))
                    lane_of.append(place % lanes[number] / lanes[number])
            mixed = entropy_generator(self.seed, step, 2).permutation(len(keys))
            yield _slice_of([keys[row] for row in mixed], np.array(lane_of)[mixed], self.rank, self.world_size)


def entropy_generator(*entropy: int) -> np.random.Generator:
    """Random numbers that are a function of these integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def _check_slices(batch_size: int, world_size: int) -> None:
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"batch_size is {batch_size} for {world_size} process(es): it must be a multiple, so that "
            "each has as many rows"
        )


def _steps(start: int, stop: int | None) -> Iterator[int] | range:
    return itertools.count(start) if stop is None else range(start, stop)


def _slice_of(keys: list[Key], lane_of: np.ndarray, rank: int, world_size: int) -> list[Key]:
    """A process's rows: those of neighbouring lanes, so that it reads few shards."""
    local = len(keys) // world_size
    chosen = np.argsort(lane_of, kind="stable")[rank * local : (rank + 1) * local]
    return [keys[row] for row in chosen]
