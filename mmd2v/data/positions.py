"""First stage of every pipeline: where this worker's samples lie, and which shards are fetched ahead for them.

The stages are objects and no closures, so that loader processes can be spawned as well as forked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from mmd2v.data.cursor import Position, micro_batches
from mmd2v.data.mixture import TrainOrder
from mmd2v.data.shards import ShardSet
from mmd2v.data.workers import worker_share

FETCHED_AHEAD = 2
"""Windows of shards that are fetched from afar: the present one and the next."""


class ShardPass(NamedTuple):
    """All samples of a shard in file order, as training sees them in an epoch."""

    set: int
    shard: int
    epoch: int


@dataclass(frozen=True)
class TrainPositions:
    """In training: where this worker's micro-batches lie."""

    order: TrainOrder
    sets: Sequence[ShardSet]
    window: int
    start_index: int
    rank: int
    world_size: int
    micro_batch_size: int

    def __call__(self) -> Iterator[list[Position]]:
        """Yield the places of each of this worker's batches."""
        worker, workers = worker_share()
        share = micro_batches(
            start_index=self.start_index,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            first=worker,
            stride=workers,
        )
        for indices in share:
            self._fetch_ahead(indices)
            yield [self.order[index] for index in indices]

    def _fetch_ahead(self, indices: range) -> None:
        if not any(shards.is_remote for shards in self.sets):
            return
        found = self.order.upcoming_shards(indices, FETCHED_AHEAD * self.window)
        for set_, shards in enumerate(self.sets):
            shards.prefetch([shard for of, shard in found if of == set_])


@dataclass(frozen=True)
class PassPositions:
    """Where shards are gone through one by one: this worker's share of the batches of all passes."""

    sets: Sequence[ShardSet]
    passes: Sequence[ShardPass]
    batch_size: int

    @property
    def batches(self) -> int:
        """Batches of all workers together."""
        return sum(math.ceil(int(self.sets[set_].counts[shard]) / self.batch_size) for set_, shard, _ in self.passes)

    def __call__(self) -> Iterator[list[Position]]:
        """Yield the places of each of this worker's batches."""
        worker, workers = worker_share()
        for number, start in islice(self._starts(), worker, None, workers):
            set_, shard, epoch = self.passes[number]
            shards = self.sets[set_]
            ahead = self.passes[number : number + FETCHED_AHEAD]
            shards.prefetch([later.shard for later in ahead if later.set == set_])
            rows = range(start, min(start + self.batch_size, int(shards.counts[shard])))
            yield [Position(epoch, shard, row, set_) for row in rows]

    def _starts(self) -> Iterator[tuple[int, int]]:
        """(number of a pass, first row) of every batch."""
        for number, (set_, shard, _) in enumerate(self.passes):
            for start in range(0, int(self.sets[set_].counts[shard]), self.batch_size):
                yield number, start


@dataclass(frozen=True)
class EvalPositions:
    """In evaluation: this worker's share of the images ``first`` … ``last - 1`` in file order."""

    shards: ShardSet
    first: int
    last: int
    batch_size: int

    def __call__(self) -> Iterator[list[Position]]:
        """Yield the places of each of this worker's batches."""
        worker, workers = worker_share()
        for start in range(self.first + worker * self.batch_size, self.last, workers * self.batch_size):
            rows = range(start, min(start + self.batch_size, self.last))
            places = [Position(0, *self.shards.locate(row)) for row in rows]
            last = min(places[-1].shard + FETCHED_AHEAD, len(self.shards.paths))
            self.shards.prefetch(range(places[0].shard, last))
            yield places
