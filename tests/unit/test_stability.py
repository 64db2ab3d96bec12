"""What counts as a jump of the loss, and how often a run may go back or leave a step out."""

from pathlib import Path

import pytest
import torch

from mmd2v.config.training import StabilityConfig
from mmd2v.errors import UserError
from mmd2v.train.skipping import GradientGate, LossWatch, RunningStatistics
from mmd2v.train.stability import Fault, RollBacks, SkipTally, SpikeGuard


def _guard(known=(), **settings) -> SpikeGuard:
    return SpikeGuard(StabilityConfig(**{"spike_factor": 3.0, "spike_window": 20} | settings), known)


def test_jump_is_told_with_its_numbers_and_is_no_part_of_the_median():
    guard = _guard([(step, 2.0) for step in range(5, 31, 5)])
    assert guard.judge(35, 6.0) is None  # not more than three times
    assert guard.judge(40, 6.1) == (
        "step 40: loss 6.1 is 3.0 times the median of the 20 steps before (2), more than stability.spike_factor 3"
    )
    assert guard.judge(40, 6.1) is not None and guard.judge(45, 2.0) is None


def test_nothing_is_judged_before_a_whole_window_is_known_or_without_a_factor():
    guard = _guard()
    assert [guard.judge(step, 10.0**step) for step in range(1, 21)] == [None] * 20
    assert guard.judge(21, 1e30) is not None
    without = _guard([(step, 2.0) for step in range(1, 60)], spike_factor=None)
    assert without.judge(60, 1e30) is None


def test_median_is_that_of_the_window():
    guard = _guard([(step, 100.0) for step in range(1, 50)])
    for step in range(50, 72):
        assert guard.judge(step, 1.0) is None
    assert guard.judge(72, 4.0) is not None


def test_intervals_longer_than_the_window_are_held_to_the_one_before():
    guard = _guard([(50, 2.0), (100, 2.0)])
    assert guard.judge(150, 2.0) is None
    assert guard.judge(200, 7.0) is not None


def test_going_back_forgets_what_came_after():
    guard = _guard([(step, 1.0) for step in range(1, 31)])
    for step in range(31, 41):
        assert guard.judge(step, 2.9) is None
    guard.go_back(30)
    assert guard.judge(31, 4.0) is not None  # the median is 1 again


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_median_that_is_not_positive_says_nothing(loss):
    guard = _guard([(step, loss) for step in range(1, 31)])
    assert guard.judge(31, 5.0) is None


def test_roll_backs_are_counted_over_resumes_and_all_named_at_last():
    newest = Path("step-000010")
    first = RollBacks(StabilityConfig())
    first.allow("step 12: a", newest)
    again = RollBacks(StabilityConfig(), first.told)
    again.allow("step 14: b", newest)
    with pytest.raises(UserError) as error:
        again.allow("step 16: c", newest)
    assert str(error.value) == (
        "step 16: c; the run has rolled back 2 times, as often as stability.roll_backs allows:\n  step 12: a\n"
        "  step 14: b"
    )
    with pytest.raises(UserError, match="step 3: d; there is no checkpoint yet to roll back to"):
        RollBacks(StabilityConfig()).allow("step 3: d", None)


def test_steps_left_out_are_counted_and_named():
    tally = SkipTally(StabilityConfig(skip_limit=3), total=1)
    faults = [Fault(0, ("loss", "a")), Fault(3, ("loss", "b"))]
    assert tally.count(7, faults) == (
        "warning: step 7 is left out: loss, a, b not finite on rank(s) 0, 3 (2 of at most 3)"
    )
    assert tally.count(8, []) == "warning: step 8 is left out: the gradient is not finite (3 of at most 3)"
    with pytest.raises(UserError, match=r"step 9: loss, a not finite on rank\(s\) 0; 3 steps were left out before it"):
        tally.count(9, faults[:1])


def test_watch_spoils_the_gradient_of_a_step_with_a_bad_term_alone():
    watch = LossWatch()
    weight = torch.tensor(2.0, requires_grad=True)
    good = {"loss": weight * 3, "a": weight * 3}
    watch.watch(good).backward()
    assert weight.grad == 3.0 and watch.faults() == []
    watch.watch({"loss": weight * 3, "a": torch.tensor(torch.inf)}).backward()
    assert weight.grad.isnan()
    watch.watch(good)  # another micro-batch of the same step
    assert watch.faults() == [Fault(0, ("a",))]
    watch.reset()
    assert watch.faults() == []


def test_gate_holds_back_a_step_whose_gradient_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    gate = GradientGate(optimizer)
    weight.grad = torch.tensor([1.0, torch.inf])
    optimizer.step()
    assert gate.closed and weight.tolist() == [1.0, 1.0] and not optimizer.state
    weight.grad = torch.ones(2)
    optimizer.step()
    assert not gate.closed and (weight < 1).all()


def test_running_statistics_of_a_step_that_was_left_out_are_those_of_before():
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    module(torch.randn(2, 1, 3, 3))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    statistics = RunningStatistics(module)
    statistics.keep()
    module(torch.full((2, 1, 3, 3), torch.nan))
    assert any(buffer.isnan().any() for buffer in module.buffers())
    statistics.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
