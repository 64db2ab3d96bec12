"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmd2v.config.schema import OptimizerConfig
from mmd2v.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine or linear decay to ``min_ratio`` of the peak, or constant."""

    shape: Literal["cosine", "linear", "constant"]
    steps: int
    warmup: int
    min_ratio: float

    def factor(self, step: int) -> float:
        """Return the fraction of the peak learning rate at ``step`` (zero-based optimiser step)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        remaining = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.min_ratio + (1 - self.min_ratio) * remaining


def build_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Make the schedule of a run of ``steps`` optimiser steps; UserError when the warm-up is no count or too long."""
    if config.warmup < 1:
        warmup = round(config.warmup * steps)
    elif config.warmup != int(config.warmup):
        raise UserError(
            f"optimizer.warmup: found {config.warmup}; expected a fraction of all steps below 1, or a whole number"
        )
    else:
        warmup = int(config.warmup)
    if warmup > steps:
        raise UserError(f"optimizer.warmup: {warmup} steps are more than the {steps} steps of the run")
    return Schedule(config.schedule, steps, warmup, config.min_lr_ratio)
