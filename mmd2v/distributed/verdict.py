"""When a rank counts as lost, and what to say of it. Nothing here communicates or looks at a clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

LOST_GRACE = 0.5
"""Seconds from a rank's end to the end of the job: its own error message should come out first."""

ERROR_GRACE = 8.0
"""Seconds the other ranks have to end by themselves after one has ended with an error: mostly all have the same."""

_MOST_NAMED = 8


class Left(StrEnum):
    """How a rank has left."""

    DONE = "done"
    RAISED = "raised"
    TORN = "torn"
    """With the error of a collective operation: most often because another rank is gone."""
    LOST = "lost"
    """Without a farewell: its process is no more."""


@dataclass
class RankState:
    """What is known of a rank. Times are of the judging process's monotonic clock, in seconds."""

    rank: int
    host: str
    pid: int
    heard: float
    """When it was last heard of."""
    since: float
    """When it began what it is doing."""
    step: int = 0
    phase: str = "starting"
    left: Left | None = None
    left_at: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        """Step and phase."""
        return f"at step {self.step} while {self.phase}"


def judge(states: Collection[RankState], now: float, timeout_s: float) -> str | None:
    """Say which rank's fate ends the job, and what it was doing; None while all is well.

    Args:
        states: of the ranks that the judging process hears of, and its own.
        now: the present time.
        timeout_s: after how many seconds without a word a rank counts as frozen.
    """
    stays = any(state.left is None for state in states)
    torn = any(state.left is Left.TORN for state in states)
    if any(_is_ripe(state, now, stays, torn) for state in states):
        # The first to leave is the cause: an error or a death tears the others' collectives, or makes NCCL end them.
        gone = [state for state in states if state.left in (Left.LOST, Left.RAISED)]
        gone = gone or [state for state in states if state.left is Left.TORN]
        first = min(gone, key=lambda state: state.left_at)
        if first.left is not Left.LOST:
            return f"{first} ended with an error {first.place}: {first.error}"
        others = [state for state in gone if state.left is Left.LOST and state is not first]
        return (
            f"{first} died {first.place} (for {first.left_at - first.since:.0f} s; no word for "
            f"{now - first.heard:.1f} s){_likewise(others)}: it crashed or was killed, for example for want of memory"
        )
    silent = sorted((s for s in states if s.left is None and now - s.heard >= 0.9 * timeout_s), key=lambda s: s.heard)
    if silent and now - silent[0].heard >= timeout_s:
        first, *others = silent
        return (
            f"{first} is frozen {first.place} (for {now - first.since:.0f} s; no word for {now - first.heard:.0f} s)"
            f"{_likewise(others)}: its process is stopped, or its host is gone"
        )
    return None


def _is_ripe(state: RankState, now: float, stays: bool, torn: bool) -> bool:
    """Whether the way this rank left must end the job now."""
    gone = now - state.left_at
    if state.left is Left.LOST:
        return gone >= LOST_GRACE
    if state.left is Left.RAISED:
        # A torn collective shows that the others did not have the error.
        return (torn and gone >= LOST_GRACE) or (stays and gone >= ERROR_GRACE)
    return state.left is Left.TORN and stays and gone >= ERROR_GRACE


def _likewise(others: list[RankState]) -> str:
    if not others:
        return ""
    named = ", ".join(f"{s.rank} ({s.host})" for s in others[:_MOST_NAMED])
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    return f", likewise rank{'s' if len(others) > 1 else ''} {named}{more}"


def standstill(states: Iterable[RankState], now: float, seconds: float) -> str | None:
    """Say who is where when no rank has got on for so many seconds and they are not all at the same; else None.

    Ranks that are all at the same thing are taken to be at work: an evaluation may last.
    """
    staying = [state for state in states if state.left is None]
    if not staying or any(now - state.since < seconds for state in staying):
        return None
    groups: dict[str, list[RankState]] = {}
    for state in staying:
        groups.setdefault(f"{state.phase} at step {state.step}", []).append(state)
    if len(groups) < 2:
        return None
    told = []
    for what, group in sorted(groups.items(), key=lambda item: len(item[1])):
        if len(group) > _MOST_NAMED:
            told.append(f"{len(group)} ranks {what}")
        else:
            told.append(f"{', '.join(map(str, group))} {what} for {now - min(s.since for s in group):.0f} s")
    return f"no rank has got on for {min(now - state.since for state in staying):.0f} s: {'; '.join(told)}"
