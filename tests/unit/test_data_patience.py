"""The arithmetic of waiting, with made-up times: quarters of a second, so that every sum is exact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.data.watch import Due, Patience

ON_TIME = st.integers(1, 12).map(lambda quarters: ("on time", quarters / 4))  # up to a tick of 1 s and LATE
STOPPED = st.integers(13, 4000).map(lambda quarters: ("stopped", quarters / 4))
AGAIN = st.just(("again", 0.0))


@given(st.lists(ON_TIME | STOPPED | AGAIN), st.integers(4, 30), st.none() | st.integers(4, 60), st.integers(0, 8))
def test_a_wait_is_what_was_watched_of_it(steps, seconds, end_after, ahead):
    now = 1000.0
    patience = Patience(seconds, end_after, now)
    assert patience.tick == 1.0
    since, waited, told = now, 0.0, 0
    for kind, length in steps:
        if kind == "again":  # a batch has arrived, and the next one is awaited
            since, waited, told = now + ahead / 1024, -ahead / 1024, 0
            continue
        now += length
        waited += length if kind == "on time" else 0.0
        if kind == "stopped":
            waited = max(0.0, waited)  # the wait began in the stop
        due = patience.look(now, since)
        assert patience.waited == waited
        if end_after is not None and waited >= end_after:
            assert due is Due.END
            return
        whole = int(waited // seconds)
        assert due is (Due.WARNING if whole > told else Due.NOTHING)
        told = whole


def test_a_warning_once_an_interval():
    patience = Patience(10, None, now=0.0)
    warned = [second for second in range(1, 60) if patience.look(float(second), since=0.0) is Due.WARNING]
    assert warned == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(("length", "due"), [(3.0, Due.END), (3.25, Due.NOTHING)])
def test_a_stop_is_what_is_longer_than_a_late_look(length, due):
    patience = Patience(60, 4, now=0.0)
    assert patience.look(1.0, since=0.0) is Due.NOTHING
    assert patience.look(1.0 + length, since=0.0) is due


def test_a_stop_between_two_waits_shortens_neither():
    patience = Patience(60, 10, now=0.0)
    assert patience.look(1.0, since=0.0) is Due.NOTHING
    assert patience.look(500.0, since=None) is Due.NOTHING and patience.waited == 0.0
    seconds = range(501, 515)
    ended = [second for second in seconds if patience.look(float(second), since=500.0) is Due.END]
    assert ended[0] == 510


@pytest.mark.parametrize(
    ("seconds", "end_after", "tick"), [(60, None, 1.0), (2, None, 0.5), (60, 1, 0.25), (1, 60, 0.25)]
)
def test_the_shorter_limit_says_how_often_to_look(seconds, end_after, tick):
    assert Patience(seconds, end_after, now=0.0).tick == tick
