"""Second stage of every pipeline: places → bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mmd2v.data.addresses import display
from mmd2v.data.collate import FetchedSample
from mmd2v.data.cursor import Position
from mmd2v.data.shards import ShardSet
from mmd2v.data.watch import Stage, WorkerStates


@dataclass(frozen=True)
class SampleReader:
    """Reads the samples of each batch."""

    sets: Sequence[ShardSet]
    names: Sequence[str]
    """Of the sets in a mixture; empty for one that stands alone."""
    images: bool
    """Whether images are read."""
    states: WorkerStates
    arrays: Sequence[str] = ()
    """Keys of the arrays that are read."""

    def __call__(self, source: Iterator[list[Position]]) -> Iterator[list[FetchedSample]]:
        """Turn each list of places into a list of samples; what cannot be read is its `Damage`."""
        for places in source:
            yield self._read(places)

    def _read(self, places: Sequence[Position]) -> list[FetchedSample]:
        """Read a batch shard by shard: a shard's index and file are looked up once, and a late one has a name."""

        def together(i: int) -> tuple[int, int]:
            # Byte ranges of a whole batch are requested side by side.
            by_range = self.sets[places[i].set].reads_ranges
            return places[i].set, -1 if by_range else places[i].shard

        fetched: dict[int, FetchedSample] = {}
        for (set_, _), group in groupby(sorted(range(len(places)), key=together), key=together):
            rows = list(group)
            self.states.enter(Stage.READING, set_, places[rows[0]].shard)
            shards = self.sets[set_]
            where = [(places[i].shard, places[i].row) for i in rows]
            raws = shards.read_many(where, images=self.images, arrays=self.arrays)
            for i, raw in zip(rows, raws, strict=True):
                shard = display(shards.paths[places[i].shard])
                fetched[i] = FetchedSample(places[i], shard, self.names[set_], raw)
        return [fetched[i] for i in range(len(places))]
