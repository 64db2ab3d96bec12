"""The learning rate as a function of the step."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.config.schema import OptimizerConfig
from mmd2v.errors import UserError
from mmd2v.train.schedule import Schedule, build_schedule


def test_warm_up_is_linear_and_reaches_the_peak():
    schedule = build_schedule(OptimizerConfig(warmup=4), 20)
    assert [schedule.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_is_that_of_the_formula():
    schedule = build_schedule(OptimizerConfig(warmup=0.1, min_lr_ratio=0.2), 100)
    assert schedule.warmup == 10
    assert schedule.factor(10) == 1.0
    assert schedule.factor(55) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule.factor(100) == pytest.approx(0.2)


def test_linear_and_constant():
    assert build_schedule(OptimizerConfig(schedule="linear", warmup=0), 10).factor(5) == 0.5
    assert build_schedule(OptimizerConfig(schedule="constant", warmup=0), 10).factor(9) == 1.0


@given(
    shape=st.sampled_from(["cosine", "linear", "constant"]),
    steps=st.integers(1, 1000),
    warmup=st.floats(0, 1),
    ratio=st.floats(0, 1),
)
def test_factor_stays_within_bounds_and_falls_after_the_warm_up(shape, steps, warmup, ratio):
    schedule = Schedule(shape, steps, round(warmup * steps), ratio)
    factors = [schedule.factor(step) for step in range(steps + 2)]
    assert all(0 <= f <= 1 for f in factors)
    falling = factors[schedule.warmup :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))
    assert all(f >= ratio - 1e-12 for f in falling)


@pytest.mark.parametrize(
    ("warmup", "message"), [(1.5, "found 1.5; expected a fraction"), (11, "11 steps are more than")]
)
def test_impossible_warm_up(warmup, message):
    with pytest.raises(UserError, match=message):
        build_schedule(OptimizerConfig(warmup=warmup), 10)
