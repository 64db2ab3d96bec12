"""Mixtures: exact shares, exact turns, and nothing that a resume would have to remember."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.cursor import Cursor
from mmd2v.data.mixture import BLOCK, RoundRobin, SingleSet, TrainOrder, Weighted, quotas
from mmd2v.errors import UserError


def mixtures():
    weighted = st.lists(st.floats(1, 10), min_size=1, max_size=4).map(
        lambda weights: Weighted({str(k): w for k, w in enumerate(weights)}, seed=3, block=64)
    )
    return st.one_of(st.builds(RoundRobin, st.integers(1, 4), st.integers(1, 9)), weighted, st.just(SingleSet()))


@settings(max_examples=60)
@given(mixtures(), st.integers(0, 500))
def test_every_set_is_used_without_gap(mixture, start):
    before = mixture.used(start)
    assert sum(before) == start
    for index in range(start, start + 200):
        chosen, own = mixture.locate(index)
        assert own == before[chosen]
        before[chosen] += 1
    assert before == mixture.used(start + 200)


def test_shares_of_a_block_are_exact_and_well_mixed():
    mixture = Weighted({"coco": 2, "cc": 1, "vg": 1}, seed=0)
    for block in (0, 5):
        chosen = [mixture.locate(block * BLOCK + i)[0] for i in range(BLOCK)]
        assert Counter(chosen) == {0: BLOCK // 2, 1: BLOCK // 4, 2: BLOCK // 4}
        of_batches = np.bincount(np.arange(BLOCK) // 256, weights=np.array(chosen) == 0)
        assert of_batches.min() > 90 and of_batches.max() < 166  # 128 expected, deviation 8
    assert mixture.locate(0)[0] != mixture.locate(BLOCK)[0] or mixture.locate(1)[0] != mixture.locate(BLOCK + 1)[0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(10, 5000))
def test_quotas_fill_the_block(weights, block):
    found = quotas(weights, block)
    assert found.sum() == block
    assert np.all(np.abs(found - np.array(weights) / sum(weights) * block) < 1)


def test_a_weight_too_small_for_a_block_is_named():
    with pytest.raises(UserError, match=r"data\.train\.sets\.tiny\.weight"):
        Weighted({"large": 1.0, "tiny": 1e-9}, seed=0)


def test_round_robin_takes_a_whole_batch_of_each_in_turn():
    mixture = RoundRobin(3, 4)
    chosen = [mixture.locate(index)[0] for index in range(24)]
    assert chosen == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4


def order(mixture):
    cursors = [Cursor(np.array(counts), seed=1, window=2, name=name) for counts, name in (([5, 3], "a"), ([4], "b"))]
    return TrainOrder(mixture, cursors, ["a", "b"])


@pytest.mark.parametrize("mixture", [RoundRobin(2, 4), Weighted({"a": 3, "b": 1}, seed=1, block=64)])
def test_epochs_of_each_set_are_whole(mixture):
    stream = order(mixture)
    places = [stream[index] for index in range(64)]
    for chosen, total in ((0, 8), (1, 4)):
        own = [(place.shard, place.row) for place in places if place.set == chosen]
        for epoch in range(len(own) // total):
            assert len(set(own[epoch * total : (epoch + 1) * total])) == total
    assert stream.epochs(64) == {
        "a": sum(place.set == 0 for place in places) / 8,
        "b": sum(place.set == 1 for place in places) / 4,
    }


def test_sets_of_equal_shape_have_orders_of_their_own():
    orders = [[Cursor(np.full(4, 25), seed=0, window=4, name=name)[i] for i in range(100)] for name in ("a", "b")]
    assert orders[0] != orders[1]


def test_an_order_travels_to_a_spawned_process():
    stream = order(Weighted({"a": 3, "b": 1}, seed=1, block=64))
    stream[70]
    again = pickle.loads(pickle.dumps(stream))
    assert [again[index] for index in range(200)] == [stream[index] for index in range(200)]
