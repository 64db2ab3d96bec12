"""When the loss has jumped, how often a run may go back, and how many steps it may leave out.

Pure decisions: every rank is given the same numbers and comes to the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mmd2v.config.training import StabilityConfig
from mmd2v.errors import UserError
from mmd2v.train.finite import ADVICE


class SpikeGuard:
    """Compares the mean loss of every interval with the median of those before it."""

    def __init__(self, settings: StabilityConfig, known: Iterable[tuple[int, float]] = ()) -> None:
        """``known`` are step and loss of the intervals that the run has had."""
        self._factor, self._window = settings.spike_factor, settings.spike_window
        self._intervals: deque[tuple[int, float]] = deque()
        self._first: int | None = None
        for step, loss in known:
            self._note(step, loss)

    def judge(self, step: int, loss: float) -> str | None:
        """Say that the loss of the interval that ends with ``step`` has jumped; else note it and return None.

        Nothing is judged before the intervals of a whole window are known.
        """
        while len(self._intervals) > 1 and self._intervals[0][0] < step - self._window:
            self._intervals.popleft()
        if self._factor is not None and self._first is not None and step - self._first >= self._window:
            middle = median(known for _, known in self._intervals)
            if 0 < self._factor * middle < loss:
                return (
                    f"step {step}: loss {loss:.4g} is {loss / middle:.1f} times the median of the {self._window} steps "
                    f"before ({middle:.4g}), more than stability.spike_factor {self._factor:g}"
                )
        self._note(step, loss)
        return None

    def go_back(self, step: int) -> None:
        """Forget what came after ``step``."""
        self._intervals = deque(one for one in self._intervals if one[0] <= step)

    def _note(self, step: int, loss: float) -> None:
        self._first = step if self._first is None else self._first
        self._intervals.append((step, loss))


class RollBacks:
    """How often a run has gone back, and whether it may once more."""

    def __init__(self, settings: StabilityConfig, told: Sequence[str] = ()) -> None:
        """``told`` are the reasons of those that an earlier part of the run has had."""
        self._limit = settings.roll_backs
        self.told = list(told)

    def allow(self, why: str, newest: Path | None) -> None:
        """Note one more. Raises UserError, naming all, when there were enough or there is no checkpoint to go to."""
        if newest is None:
            raise UserError(f"{why}; there is no checkpoint yet to roll back to (checkpoint.every)")
        if len(self.told) >= self._limit:
            before = "".join(f"\n  {one}" for one in self.told)
            raise UserError(
                f"{why}; the run has rolled back {len(self.told)} times, as often as stability.roll_backs allows"
                + (f":{before}" if before else "")
            )
        self.told.append(why)


@dataclass(frozen=True)
class Fault:
    """What of a step was not finite on one rank."""

    rank: int
    terms: tuple[str, ...]


class SkipTally:
    """The steps that were left out."""

    def __init__(self, settings: StabilityConfig, total: int = 0) -> None:
        """``total`` were left out by an earlier part of the run."""
        self._limit, self.total = settings.skip_limit, total

    def count(self, step: int, faults: Sequence[Fault]) -> str:
        """Count a step (from 1) and return the line that tells of it. ``faults`` are of all ranks; none: the gradient.

        Raises UserError when there are more than allowed.
        """
        self.total += 1
        terms = list(dict.fromkeys(term for fault in faults for term in fault.terms))
        ranks = ", ".join(str(fault.rank) for fault in faults)
        what = f"{', '.join(terms)} not finite on rank(s) {ranks}" if faults else "the gradient is not finite"
        if self.total > self._limit:
            raise UserError(
                f"step {step}: {what}; {self._limit} steps were left out before it, as many as stability.skip_limit "
                f"allows; {ADVICE}"
            )
        return f"warning: step {step} is left out: {what} ({self.total} of at most {self._limit})"
