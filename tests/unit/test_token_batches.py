"""Steps of tokens: every text once an epoch, never over the budget, the same steps however they are divided."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.token_batches import LEAST_TEXTS, TokenOrder, Totals, divide
from mmd2v.data.token_lengths import Counts
from mmd2v.errors import UserError


class Texts:
    """A made-up set: tokens of every text of every shard, in rows of up to three texts."""

    def __init__(self, lengths: list[np.ndarray]) -> None:
        self.lengths = lengths
        self.loads: list[int] = []

    def __call__(self, shard: int) -> Counts:
        self.loads.append(shard)
        count = len(self.lengths[shard])
        return Counts(self.lengths[shard].astype(np.int32), np.append(np.arange(0, count, 3), count))

    def totals(self) -> Totals:
        return Totals(
            np.array([len(part) for part in self.lengths]),
            np.array([part.sum() for part in self.lengths]),
            max(int(part.max(initial=0)) for part in self.lengths),
        )

    def order(self, budget: int, window: int = 2, seed: int = 0) -> TokenOrder:
        return TokenOrder(self.totals(), self, budget=budget, window=window, seed=seed)

    def of(self, place) -> int:
        return int(self.lengths[place.shard][3 * place.row + place.caption])


def some_texts(shards: int, most: int, longest: int, seed: int) -> Texts:
    """Lengths as sentences have them, log-normal, and shards of all sizes, empty ones too."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, most + 1, shards)
    sizes[0] = max(1, sizes[0])
    return Texts([np.clip(random.lognormal(2.5, 0.6, n), 1, longest).astype(np.int64) for n in sizes])


@st.composite
def cases(draw):
    texts = some_texts(
        draw(st.integers(1, 9)), draw(st.integers(1, 60)), draw(st.integers(1, 60)), draw(st.integers(0, 10**6))
    )
    budget = texts.totals().longest * draw(st.integers(LEAST_TEXTS, 40)) + draw(st.integers(0, 50))
    return texts, budget, draw(st.integers(1, 10)), draw(st.integers(0, 5))


def places(positions) -> list[tuple]:
    return [(p.shard, p.row, p.caption) for p in positions]


@given(cases(), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_every_text_comes_once_an_epoch_within_the_budget(case, epoch):
    texts, budget, window, seed = case
    order = texts.order(budget, window, seed)
    seen = []
    for step in range(epoch * order.epoch_steps, (epoch + 1) * order.epoch_steps):
        samples = order.samples(step)
        assert order.fewest_texts <= len(samples)
        assert sum(map(texts.of, samples)) <= budget
        assert {p.epoch for p in samples} == {epoch}
        assert [texts.of(p) for p in samples] == sorted(texts.of(p) for p in samples)
        seen += places(samples)
    everything = [(shard, text // 3, text % 3) for shard, part in enumerate(texts.lengths) for text in range(len(part))]
    assert sorted(seen) == everything


@given(cases(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_ranks_and_accumulation_only_divide_a_step(case, ranks, accumulation):
    texts, budget, window, seed = case
    order = texts.order(budget, window, seed)
    parts = ranks * accumulation
    for step in range(min(order.epoch_steps, 4)):
        whole = order.samples(step)
        if len(whole) < parts:
            with pytest.raises(UserError, match=rf"a step has {len(whole)} texts, expected one at least for each of"):
                order.micro_batch(step, 0, parts)
            with pytest.raises(UserError, match=r"may have as few as"):
                order.check_parts(parts)
            continue
        divided = [order.micro_batch(step, part, parts) for part in range(parts)]
        assert [place for part in divided for place in places(part)] == places(whole)
        longest = max(map(texts.of, whole))
        for micro_batch in divided:
            assert 0 < sum(map(texts.of, micro_batch)) <= budget / parts + longest
            assert {p.mean_over for p in micro_batch} == {len(whole) / parts}


@given(cases(), st.integers(0, 10**4))
@settings(max_examples=60, deadline=None)
def test_a_position_is_the_number_of_a_step(case, start):
    """Whoever starts at a step gets what somebody who came from the beginning gets."""
    texts, budget, window, seed = case
    start %= 3 * texts.order(budget, window, seed).epoch_steps
    from_start = texts.order(budget, window, seed)
    expected = [places(from_start.samples(step)) for step in range(start + 3)][start:]
    resumed = texts.order(budget, window, seed)
    assert [places(resumed.samples(step)) for step in range(start, start + 3)] == expected


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 12))
def test_parts_are_never_empty_and_hold_a_share_and_one_text_at_most(lengths, parts):
    lengths_n = np.array(lengths)
    if len(lengths) < parts:
        with pytest.raises(UserError, match=r"ranks × accumulation; raise it"):
            divide(lengths_n, parts)
        return
    cuts = divide(lengths_n, parts)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(lengths), parts + 1)
    assert (np.diff(cuts) > 0).all()
    for first, last in itertools.pairwise(cuts):
        assert lengths_n[first:last].sum() <= sum(lengths) / parts + max(lengths)


@pytest.mark.parametrize("shards", [1, 20])
def test_the_budget_is_well_filled_up_to_the_end_of_the_epoch(shards):
    texts = some_texts(shards, 20_000 // shards, 64, seed=1)
    order = texts.order(4096, window=4)
    filled = [sum(map(texts.of, order.samples(step))) / 4096 for step in range(order.epoch_steps)]
    assert np.mean(filled) == pytest.approx(order.fill) and order.fill > 0.95
    assert min(filled[-5:]) > 0.93


def test_order_is_another_in_every_epoch_and_for_every_seed():
    texts = some_texts(5, 60, 30, seed=4)
    order = texts.order(400)
    epochs = [[places(order.samples(e * order.epoch_steps + s)) for s in range(order.epoch_steps)] for e in (0, 1)]
    other = texts.order(400, seed=1)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [places(other.samples(s)) for s in range(order.epoch_steps)]


def test_steps_of_a_window_come_in_random_order_of_lengths():
    texts = some_texts(4, 2000, 60, seed=2)
    order = texts.order(1000, window=4)
    means = [np.mean([texts.of(p) for p in order.samples(step)]) for step in range(order.epoch_steps)]
    assert order.windows == 1 and len(means) > 20
    assert means != sorted(means)
    assert np.std(means) > 5  # and texts of a step are alike: steps differ


def test_a_step_reads_the_lengths_of_its_window_alone():
    texts = some_texts(200, 100, 20, seed=3)
    order = texts.order(1000, window=5)
    texts.loads.clear()
    order.samples(order.epoch_steps // 2)
    assert 0 < len(set(texts.loads)) <= 5 + 2
    upcoming = order.upcoming_shards(order.epoch_steps // 2, 3)
    assert len(upcoming) == 3 and set(upcoming) <= set(texts.loads)


def test_equal_lengths_need_no_luck():
    texts = Texts([np.full(100, 10)] * 3)
    order = texts.order(100)
    assert {len(order.samples(step)) for step in range(order.epoch_steps)} <= {8, 9, 10}


def test_epochs_count_steps():
    order = some_texts(3, 50, 20, seed=0).order(300)
    assert order.epochs(0) == {"": 0.0} and order.epochs(2 * order.epoch_steps) == {"": 2.0}


def test_errors_name_the_key_and_the_number():
    texts = Texts([np.full(30, 20)])
    with pytest.raises(UserError, match=r"data\.batch_tokens: found 100, expected at least 160: 8 times the longest"):
        texts.order(100)
    with pytest.raises(UserError, match=r"found no text"):
        Texts([np.zeros(0, np.int64)]).order(100)
    order = texts.order(200)
    with pytest.raises(UserError, match=r"a step of 200 tokens may have as few as \d texts .* each of the 40 ranks"):
        order.check_parts(40)
    order.check_parts(2)


def test_lengths_that_changed_meanwhile_are_noticed():
    texts = Texts([np.full(30, 20)])
    order = texts.order(200)
    texts.lengths[0] = np.full(30, 19)
    with pytest.raises(UserError, match=r"shard 0: its token lengths have changed"):
        order.samples(0)
