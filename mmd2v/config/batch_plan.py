"""How a step's images are divided: ranks × micro-batch × accumulation, and how many steps a run has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmd2v.config.schema import Config
from mmd2v.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of one optimiser step. All counts are images or steps."""

    global_batch: int
    ranks: int
    micro_batch: int
    accumulation: int

    @property
    def images_per_rank(self) -> int:
        """Images a rank sees in one optimiser step."""
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank" + "s" * (self.ranks > 1)
        parts = f"{ranks} × {self.micro_batch} images × {self.accumulation} accumulation"
        return f"{parts} = {self.global_batch} images a step"


def plan_batches(config: Config, ranks: int) -> BatchPlan:
    """Divide ``engine.batch_size`` over ``ranks``; raise UserError with the arithmetic when it does not go."""
    total = config.engine.batch_size
    if total % ranks:
        lower, upper = total // ranks * ranks, (total // ranks + 1) * ranks
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"engine.batch_size: {total} images cannot be divided by {ranks} ranks: {total} = {ranks} × "
            f"{total // ranks} + {total % ranks}; nearest sizes that can: {near}"
        )
    share = total // ranks
    micro = config.engine.micro_batch_size or share
    if share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - micro))
        raise UserError(
            f"engine.micro_batch_size: {micro} does not divide a rank's share of the batch: engine.batch_size {total} "
            f"/ {ranks} ranks = {share} images = {micro} × {share // micro} + {share % micro}; nearest size that does: "
            f"{nearest}"
        )
    return BatchPlan(total, ranks, micro, share // micro)


def total_steps(config: Config, plan: BatchPlan, dataset_size: int | None) -> int:
    """Return the optimiser steps of a run: ``config.steps``, or enough for ``config.epochs`` over the data.

    Raises UserError when the run is given in epochs and ``dataset_size`` (images) is unknown.
    """
    if config.steps is not None:
        return config.steps
    if dataset_size is None:
        raise UserError("epochs: the number of steps follows from the size of data.train, which is not known")
    assert config.epochs is not None  # the schema wants exactly one of the two
    if config.data.last_batch == "drop":
        dataset_size = dataset_size // plan.global_batch * plan.global_batch
    return max(1, math.ceil(config.epochs * dataset_size / plan.global_batch))
