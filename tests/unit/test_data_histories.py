"""Any history of kills, world sizes and worker counts gives each sample exactly once an epoch, in one order."""

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.cursor import Cursor, Position, micro_batches
from mmd2v.data.mixture import RoundRobin, SingleSet, TrainOrder, Weighted

BATCH = 12
WORLDS = {1: (12, 6, 3), 2: (6, 3, 2), 3: (4, 2), 4: (3, 1), 6: (2, 1), 12: (1,)}  # ranks → micro-batch sizes

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=10).filter(lambda counts: sum(counts) >= BATCH)
segments = st.lists(
    st.tuples(
        st.sampled_from(sorted(WORLDS)),
        st.integers(0, 9),  # which of its micro-batch sizes
        st.integers(1, 3),  # loader workers
        st.integers(1, 9),  # steps until the kill
        st.integers(0, 4),  # of them, steps since the last checkpoint
    ),
    min_size=1,
    max_size=5,
)


def consumed(order: TrainOrder, world: int, micro: int, workers: int, first: int, last: int) -> list[list[Position]]:
    """What each step from ``first`` to ``last`` consumes, micro-batch by micro-batch and rank by rank."""
    accumulation = BATCH // (world * micro)
    streams = [_rank(world, rank, micro, workers, first) for rank in range(world)]
    return [
        [order[index] for _ in range(accumulation) for stream in streams for index in next(stream)]
        for _ in range(first, last)
    ]


def _rank(world: int, rank: int, micro: int, workers: int, first: int) -> Iterator[range]:
    """A rank's micro-batches, made by its workers in turn."""
    common = {"start_index": first * BATCH, "rank": rank, "world_size": world, "micro_batch_size": micro}
    shares = [micro_batches(**common, first=worker, stride=workers) for worker in range(workers)]
    for place in itertools.count():
        yield next(shares[place % workers])


@settings(max_examples=80, deadline=None)
@given(
    sizes=shard_sizes,
    history=segments,
    window=st.integers(1, 4),
    lanes=st.sampled_from([1, 2, 3, 6]),
    drop=st.booleans(),
    seed=st.integers(0, 9),
)
def test_exactly_once_whatever_happens(sizes, history, window, lanes, drop, seed):
    def order(micro: int) -> TrainOrder:
        cursor = Cursor(
            np.array(sizes), seed=seed, window=window, lanes=lanes, batch=BATCH, drop_last=drop, spread=micro
        )
        return TrainOrder(SingleSet(), [cursor], [""])

    taken: list[list[Position]] = []
    for world, choice, workers, steps, lost in history:
        micro = WORLDS[world][choice % len(WORLDS[world])]
        saved = max(0, len(taken) - lost)
        found = consumed(order(micro), world, micro, workers, saved, saved + steps)
        # What the killed run had done since its checkpoint is done again, in the same steps.
        for before, again in zip(taken[saved:], found, strict=False):
            assert sorted(before) == sorted(again)
        taken[saved:] = found
    length = order(1).cursors[0].epoch_length
    stream = [place for step in taken for place in sorted(step)]
    for start in range(0, len(stream) - length + 1, length):
        epoch = [place[1:3] for step in taken for place in step if place.epoch == start // length]
        assert len(epoch) == len(set(epoch)) == length
    uninterrupted = consumed(order(BATCH), 1, BATCH, 1, 0, len(taken))
    assert [sorted(step) for step in taken] == [sorted(step) for step in uninterrupted]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(shard_sizes, min_size=2, max_size=3),
    history=segments,
    round_robin=st.booleans(),
    seed=st.integers(0, 9),
)
def test_mixtures_too(sizes, history, round_robin, seed):
    names = [f"set{k}" for k in range(len(sizes))]

    def order() -> TrainOrder:
        cursors = [Cursor(np.array(c), seed=seed, window=2, name=n) for c, n in zip(sizes, names, strict=True)]
        weights = {name: k + 1.0 for k, name in enumerate(names)}
        mixture = RoundRobin(len(names), BATCH) if round_robin else Weighted(weights, seed, block=60)
        return TrainOrder(mixture, cursors, names)

    taken: list[list[Position]] = []
    for world, choice, workers, steps, lost in history:
        micro = WORLDS[world][choice % len(WORLDS[world])]
        saved = max(0, len(taken) - lost)
        taken[saved:] = consumed(order(), world, micro, workers, saved, saved + steps)
    for chosen, counts in enumerate(sizes):
        own = [place for step in taken for place in step if place.set == chosen]
        seen = [tuple(place[:3]) for place in own]
        assert len(set(seen)) == len(seen)  # no sample twice in one of its epochs
        for epoch in range(len(own) // sum(counts)):
            assert sum(place.epoch == epoch for place in own) == sum(counts)
