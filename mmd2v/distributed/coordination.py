"""Decisions that one rank takes for all, errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmd2v.distributed.collectives import broadcast_object, rank
from mmd2v.errors import UserError

Result = TypeVar("Result")


class ReportedByMainRank(UserError):
    """The copy of rank 0's UserError that the other ranks raise; rank 0 alone prints it."""


def from_main_rank(decide: Callable[[], Result]) -> Result:
    """Run ``decide`` on rank 0 and return its (picklable) result on every rank.

    An error of rank 0 is raised on every rank, so that none is left waiting: there as it is, elsewhere as
    `ReportedByMainRank`.
    """
    outcome: tuple[Result | None, str | None] = (None, None)
    error: Exception | None = None
    if rank() == 0:
        try:
            outcome = (decide(), None)
        except Exception as problem:
            error = problem
            outcome = (None, str(problem))
    result, message = broadcast_object(outcome)
    if error is not None:
        raise error
    if message is not None:
        raise ReportedByMainRank(message)
    return result
