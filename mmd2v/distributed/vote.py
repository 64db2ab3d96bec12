"""What the ranks must agree on between two steps, without any of them waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmd2v.distributed.environment import COLLECTIVE_TIMEOUT, World


@dataclass(frozen=True)
class Ballot:
    """What the ranks said after one step, the same on all of them. Of a number, the largest."""

    step: int
    """Finished steps when it was cast."""
    stop: int = 0
    """Number of a signal that a rank has been sent; 0: none."""
    writing: bool = False
    """A rank's checkpoint is still being written."""
    due: bool = False
    """Rank 0's clock asks for a checkpoint."""


class StepVote:
    """One ballot a step on a gloo group of its own, so that it neither queues behind gradients nor needs the device.

    The ballot of a step is read a step later: by then it has long arrived, and every rank reads it at the same step.
    """

    def __init__(self, world: World) -> None:
        """Every rank must call it."""
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world.size > 1 else None
        self._open: tuple[int, torch.Tensor, dist.Work | None] | None = None

    def cast(self, step: int, *, stop: int = 0, writing: bool = False, due: bool = False) -> Ballot | None:
        """Cast this rank's flags after ``step`` steps and return the ballot before; None at the first. Collective."""
        flags = torch.tensor([stop, writing, due], dtype=torch.int32)
        before, self._open = self._open, (step, flags, self._reduce(flags))
        return None if before is None else _read(*before)

    def ask(self, step: int, *, stop: int = 0, writing: bool = False, due: bool = False) -> Ballot:
        """Cast this rank's flags and wait for those of all others. What an open ballot says is added. Collective."""
        before = self.cast(step, stop=stop, writing=writing, due=due)
        assert self._open is not None  # just cast
        last, self._open = _read(*self._open), None
        if before is None:
            return last
        return Ballot(step, max(before.stop, last.stop), last.writing, before.due or last.due)

    def close(self) -> None:
        """Wait for an open ballot and leave the group. Every rank must call it, or none: it waits for them."""
        if self._open is not None:
            _read(*self._open)
            self._open = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _reduce(self, flags: torch.Tensor) -> dist.Work | None:
        if self._group is None:
            return None
        return dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)


def _read(step: int, flags: torch.Tensor, work: dist.Work | None) -> Ballot:
    if work is not None:
        work.wait()
    stop, writing, due = flags.tolist()
    return Ballot(step, stop, bool(writing), bool(due))
