"""The interval between two reports: its time, and the samples and tokens in it."""

from __future__ import annotations

import torch

from mmd2v.distributed.collectives import mean_over_ranks
from mmd2v.distributed.environment import World
from mmd2v.train.metrics import Stopwatch


class Interval:
    """What is counted from one report to the next, and the mean time of a step since the run began to estimate by.

    Attributes:
        stopwatch: time of the interval.
    """

    def __init__(self, world: World, steps: int, step: int, sample_index: int, *, counts_tokens: bool) -> None:
        """``steps`` are those of the whole run, ``step`` those that are done."""
        self._world, self._steps, self._counts_tokens = world, steps, counts_tokens
        self.stopwatch = Stopwatch()
        self.start_over(step, sample_index)

    def start_over(self, step: int, sample_index: int) -> None:
        """Begin at a step, with no memory of what came before."""
        self._first, self._worked = step, 0.0
        self.begin(step, sample_index)

    def begin(self, step: int, sample_index: int) -> None:
        """Begin the next interval."""
        self._step, self._sample_index, self._tokens = step, sample_index, 0
        self.stopwatch.reset()

    def add_tokens(self, count: int) -> None:
        """Count text tokens of this rank."""
        self._tokens += count

    def measure(self, step: int, sample_index: int) -> dict[str, float]:
        """Return throughput and times of the interval that ends here; once an interval. Every rank must call it."""
        seconds = self.stopwatch.working
        self._worked += seconds
        per_step = self._worked / (step - self._first)
        return {
            "throughput(samples/s)": (sample_index - self._sample_index) / seconds,
            **self._token_throughput(seconds),
            "time/step(s)": seconds / (step - self._step),
            "time/data(%)": 100 * self.stopwatch.waiting / seconds,
            "time/eta(s)": per_step * (self._steps - step),
        }

    def _token_throughput(self, seconds: float) -> dict[str, float]:
        """Text tokens of all ranks."""
        if not self._counts_tokens:
            return {}
        own = torch.tensor(float(self._tokens), dtype=torch.float64, device=self._world.device)
        return {"throughput(tokens/s)": float(mean_over_ranks(own)) * self._world.size / seconds}
