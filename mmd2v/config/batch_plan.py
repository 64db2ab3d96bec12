"""How a step's samples or tokens are divided: ranks × micro-batch × accumulation, and how many steps a run has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmd2v.config.schema import Config
from mmd2v.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of one optimiser step. Counts are of ``unit`` or steps."""

    global_batch: int
    ranks: int
    micro_batch: int
    """Of tokens: about, see `mmd2v.data.token_batches.divide`."""
    accumulation: int
    unit: Literal["images", "samples", "tokens"] = "images"

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank" + "s" * (self.ranks > 1)
        if self.unit == "tokens":
            parts = f"{ranks} × about {self.micro_batch:,} tokens × {self.accumulation} accumulation"
            return f"{parts}, at most {self.global_batch:,} tokens a step"
        parts = f"{ranks} × {self.micro_batch} {self.unit} × {self.accumulation} accumulation"
        return f"{parts} = {self.global_batch} {self.unit} a step"


def plan_batches(config: Config, ranks: int) -> BatchPlan:
    """Divide ``engine.batch_size`` or ``data.batch_tokens`` over ``ranks``.

    Raises UserError with the arithmetic when samples do not go; tokens always do.
    """
    if config.data.batch_tokens is not None:
        tokens, most = config.data.batch_tokens, config.data.micro_batch_tokens
        accumulation = 1 if most is None else math.ceil(tokens / (ranks * most))
        return BatchPlan(tokens, ranks, tokens // (ranks * accumulation), accumulation, "tokens")
    total = config.engine.batch_size
    assert total is not None  # the schema wants one of the two
    unit: Literal["images", "samples"] = "images" if config.uses_images else "samples"
    if total % ranks:
        lower, upper = total // ranks * ranks, (total // ranks + 1) * ranks
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"engine.batch_size: {total} {unit} cannot be divided by {ranks} ranks: {total} = {ranks} × "
            f"{total // ranks} + {total % ranks}; nearest sizes that can: {near}"
        )
    share = total // ranks
    micro = config.engine.micro_batch_size or share
    if share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - micro))
        raise UserError(
            f"engine.micro_batch_size: {micro} does not divide a rank's share of the batch: engine.batch_size {total} "
            f"/ {ranks} ranks = {share} {unit} = {micro} × {share // micro} + {share % micro}; nearest size that does: "
            f"{nearest}"
        )
    return BatchPlan(total, ranks, micro, share // micro, unit)


def total_steps(config: Config, plan: BatchPlan, dataset_size: int | None, epoch_steps: int | None = None) -> int:
    """Return the optimiser steps of a run: ``config.steps``, or enough for ``config.epochs`` over the data.

    ``epoch_steps`` is how many an epoch of batches of tokens has.
    Raises UserError when the run is given in epochs and ``dataset_size`` (images), or of tokens ``epoch_steps``, is
    unknown.
    """
    if config.steps is not None:
        return config.steps
    if plan.unit == "tokens":
        if epoch_steps is None:
            raise UserError("epochs: the number of steps follows from the lengths of the texts, which are not known")
        assert config.epochs is not None
        return max(1, math.ceil(config.epochs * epoch_steps))
    if dataset_size is None:
        raise UserError("epochs: the number of steps follows from the size of data.train, which is not known")
    assert config.epochs is not None  # the schema wants exactly one of the two
    if config.data.last_batch == "drop":
        dataset_size = dataset_size // plan.global_batch * plan.global_batch
    return max(1, math.ceil(config.epochs * dataset_size / plan.global_batch))
