"""Decisions that one rank takes for all, errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmd2v.distributed.collectives import broadcast_object, gather_objects, rank
from mmd2v.errors import ReportedByMainRank, UserError

Result = TypeVar("Result")


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


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Run ``action``, which must not communicate, on every rank and return this rank's result.

    A UserError of any rank ends all of them; rank 0 tells it, once when all have the same.
    """
    result: Result | None = None
    error: UserError | None = None
    try:
        result = action()
    except UserError as problem:
        error = problem
    messages = gather_objects(None if error is None else str(error))
    if any(message is not None for message in messages):
        if len(set(messages)) == 1:
            text = messages[0]
        else:
            text = "\n".join(f"rank {i}: {message}" for i, message in enumerate(messages) if message is not None)
        raise shared_error(text) from error
    return result  # type: ignore[return-value] - an action that raised does not get here


def shared_error(message: str) -> UserError:
    """Return what this rank raises when every rank has come to the same error: rank 0 alone tells it."""
    return UserError(message) if rank() == 0 else ReportedByMainRank(message)
