import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.cursor import Cursor, micro_batches
from mmd2v.data.draws import permutation, uniforms, words
from mmd2v.errors import UserError

counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)


@given(counts, st.integers(0, 2**70), st.integers(1, 15), st.integers(0, 3))
def test_every_sample_exactly_once_an_epoch(counts, seed, window, epoch):
    cursor = Cursor(np.array(counts), seed=seed, window=window)
    places = [cursor[index] for index in range(epoch * cursor.total, (epoch + 1) * cursor.total)]
    assert {place.epoch for place in places} == {epoch}
    expected = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert sorted((place.shard, place.row) for place in places) == expected


@given(counts, st.integers(0, 99), st.integers(1, 4))
def test_random_access_equals_reading_on(counts, seed, window):
    cursor = Cursor(np.array(counts), seed=seed, window=window)
    along = [cursor[index] for index in range(3 * cursor.total)]
    for index in np.random.default_rng(seed).permutation(3 * cursor.total)[:40].tolist():
        assert Cursor(np.array(counts), seed=seed, window=window)[index] == along[index]
        assert cursor[index] == along[index]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_ranks_share_the_stream_without_gap_or_overlap(world, micro, accumulation, step):
    size = world * micro * accumulation
    seen = []
    for rank in range(world):
        share = micro_batches(start_index=step * size, rank=rank, world_size=world, micro_batch_size=micro)
        for _ in range(accumulation):
            seen += next(share)
    assert sorted(seen) == list(range(step * size, (step + 1) * size))


@settings(max_examples=50)
@given(st.sampled_from([(1, 12, 1), (2, 6, 1), (4, 3, 1), (2, 3, 2), (3, 2, 2), (1, 1, 12)]), st.integers(0, 20))
def test_a_step_has_the_same_samples_for_any_world_size(layout, step):
    world, micro, accumulation = layout
    cursor = Cursor(np.array([5, 0, 9, 3]), seed=1, window=2)
    reference = [cursor[index] for index in range(step * 12, (step + 1) * 12)]
    seen = []
    for rank in range(world):
        share = micro_batches(start_index=step * 12, rank=rank, world_size=world, micro_batch_size=micro)
        for _ in range(accumulation):
            seen += [cursor[index] for index in next(share)]
    assert sorted(seen) == sorted(reference)


@given(st.integers(1, 5))
def test_workers_share_the_batches_in_turn(workers):
    common = {"start_index": 6, "rank": 1, "world_size": 2, "micro_batch_size": 3}
    alone = micro_batches(**common)
    shares = [micro_batches(**common, first=worker, stride=workers) for worker in range(workers)]
    for place in range(20):
        assert next(shares[place % workers]) == next(alone)


def test_epochs_and_seeds_differ():
    cursor = Cursor(np.full(20, 10), seed=0, window=4)
    orders = [[cursor[e * 200 + i][1:] for i in range(200)] for e in range(3)]
    other = [Cursor(np.full(20, 10), seed=1, window=4)[i][1:] for i in range(200)]
    assert len({tuple(order) for order in [*orders, other]}) == 4


def test_samples_mix_across_the_shards_of_a_window():
    cursor = Cursor(np.full(8, 1000), seed=0, window=4)
    first = [cursor[index].shard for index in range(400)]
    shares = np.bincount(first, minlength=8)
    assert (shares > 0).sum() == 4
    assert shares[shares > 0].min() > 60


def test_memory_is_that_of_a_window():
    counts_S = np.full(100_000, 10_000)
    tracemalloc.start()
    cursor = Cursor(counts_S, seed=3, window=16)
    for index in range(10**9 - 5, 10**9 + 200_000, 9973):
        cursor[index]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 10^9 samples; a window has 160,000 and needs some arrays of them.
    assert peak < 20 * 2**20


def test_no_sample_is_an_error():
    with pytest.raises(UserError, match="no sample"):
        Cursor(np.array([0, 0]), seed=0, window=2)


def test_random_words_never_change():
    # The order of every running training depends on these: they may not differ between versions or machines.
    assert words(3, "x", 7, 1).tolist() == WORDS
    assert permutation(8, "x", 7).tolist() == ORDER


WORDS = [4747831609900353483, 1683238806852764385, 6381832566395557655]
ORDER = [3, 1, 0, 2, 7, 4, 6, 5]


@given(st.integers(0, 2**64), st.text(max_size=5))
def test_uniforms_are_in_the_half_open_interval(seed, name):
    values = uniforms(100, name, seed)
    assert values.min() >= 0 and values.max() < 1
    assert 0.3 < values.mean() < 0.7


# ------------------------------------------------------------------------------------ lanes, last batch

layouts = st.tuples(st.integers(1, 4), st.integers(1, 5)).map(lambda pair: (pair[0], pair[0] * pair[1]))  # lanes, batch


@settings(max_examples=60)
@given(counts, st.integers(0, 99), st.integers(1, 5), layouts, st.integers(0, 2))
def test_every_sample_once_an_epoch_in_any_number_of_lanes(counts, seed, window, layout, epoch):
    lanes, batch = layout
    cursor = Cursor(np.array(counts), seed=seed, window=window, lanes=lanes, batch=batch)
    indices = range(epoch * cursor.epoch_length, (epoch + 1) * cursor.epoch_length)
    expected = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert sorted(cursor[index][1:3] for index in indices) == expected
    # Any window may have been forgotten meanwhile.
    for index in indices[:: max(1, len(indices) // 7)]:
        assert cursor[index] == Cursor(np.array(counts), seed=seed, window=window, lanes=lanes, batch=batch)[index]


@settings(max_examples=40)
@given(counts, st.integers(0, 99), layouts)
def test_dropping_leaves_whole_batches_of_distinct_samples(counts, seed, layout):
    lanes, batch = layout
    if sum(counts) < batch:
        with pytest.raises(UserError, match=r"data\.last_batch: drop leaves nothing"):
            Cursor(np.array(counts), seed=seed, window=2, lanes=lanes, batch=batch, drop_last=True)
        return
    cursor = Cursor(np.array(counts), seed=seed, window=2, lanes=lanes, batch=batch, drop_last=True)
    assert cursor.epoch_length == sum(counts) // batch * batch
    for epoch in range(2):
        places = [cursor[epoch * cursor.epoch_length + i] for i in range(cursor.epoch_length)]
        assert {place.epoch for place in places} == {epoch}
        assert len({place[1:3] for place in places}) == len(places)


def test_other_samples_are_dropped_in_other_epochs():
    cursor = Cursor(np.array([7]), seed=0, window=1, batch=4, drop_last=True)
    epochs = [frozenset(cursor[4 * epoch + i].row for i in range(4)) for epoch in range(20)]
    assert len(set(epochs)) > 5


def test_a_rank_reads_the_shards_of_its_lanes_alone():
    # 64 shards of 100 samples, 4 ranks with a lane each: a rank meets its quarter of the shards and no other.
    cursor = Cursor(np.full(64, 100), seed=5, window=4, lanes=4, batch=32, spread=8)
    shards = [set() for _ in range(4)]
    for rank in range(4):
        share = micro_batches(start_index=0, rank=rank, world_size=4, micro_batch_size=8)
        for _ in range(6400 // 32):
            shards[rank] |= {cursor[index].shard for index in next(share)}
    assert [len(found) for found in shards] == [16] * 4
    assert set.union(*shards) == set(range(64))
    # With one lane, every rank meets every shard.
    alone = Cursor(np.full(64, 100), seed=5, window=4, batch=32)
    share = micro_batches(start_index=0, rank=0, world_size=4, micro_batch_size=8)
    assert len({alone[index].shard for _ in range(200) for index in next(share)}) == 64


def test_one_lane_keeps_the_order_that_running_trainings_have():
    cursor = Cursor(np.array([3, 0, 2, 4]), seed=7, window=2)
    assert [cursor[index][1:3] for index in range(9)] == PINNED


PINNED = [(3, 2), (0, 2), (0, 0), (3, 3), (3, 1), (0, 1), (3, 0), (2, 1), (2, 0)]


def test_upcoming_shards_begin_with_the_present_window():
    cursor = Cursor(np.full(12, 10), seed=2, window=3, lanes=2, batch=8)
    for index in range(0, 120, 7):
        upcoming = cursor.upcoming_shards(index, 6)
        assert cursor[index].shard in upcoming[:3]
        assert len(upcoming) <= 6
    # All that a lane reads later is announced before it is read.
    lane = [index for index in range(120) if index % 8 < 4]
    seen = [cursor[index].shard for index in lane]
    assert set(seen[:30]) <= set(cursor.upcoming_shards(lane[0], 3))


def test_upcoming_shards_go_on_into_the_next_epoch():
    cursor = Cursor(np.full(12, 10), seed=2, window=3)
    upcoming = cursor.upcoming_shards(119, 6)
    assert cursor[119].shard in upcoming[:3] and cursor[120].shard in upcoming[3:]


def test_lanes_must_divide_the_batch():
    with pytest.raises(UserError, match=r"data\.lanes: 3 does not divide engine\.batch_size 8; nearest .* 2"):
        Cursor(np.array([9]), seed=0, window=1, lanes=3, batch=8)
