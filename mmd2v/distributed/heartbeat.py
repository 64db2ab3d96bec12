"""A rank that dies, freezes or fails alone ends the whole job, with a message that names it.

Without this, the other ranks wait in a collective operation until its time-out, which names nobody. Every rank has a
thread beside the training thread. That of rank 0 listens; those of the others keep a connection to it, on which both
sides say twice a second where they are. So it works under every launcher, and while the training thread is inside a
collective (which releases the interpreter): only a process that is stopped or gone falls silent.

`heartwatch` is the thread, `switchboard` its connections, `verdict` what it judges by; `finding_rank0` tells how the
ranks meet, and `heartline` what they say.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.distributed.environment import World
from mmd2v.distributed.finding_rank0 import Meeting, open_meeting
from mmd2v.distributed.heartwatch import Watch
from mmd2v.distributed.leaving import first_line, how_left
from mmd2v.distributed.processes import farewells
from mmd2v.distributed.verdict import Left


class Pulse:
    """The signs of life of this rank. A context manager around all that a run does; every rank must enter it together.

    Attributes:
        newest: tells the newest checkpoint for the message, None where there is none; to be set by the run.
    """

    newest: Callable[[], Path | None] | None = None

    def __init__(self, world: World, timeout_s: float, *, peaceful: tuple[type[BaseException], ...] = ()) -> None:
        """With one rank nothing is ever sent.

        Args:
            world: the ranks.
            timeout_s: seconds without a word after which a rank counts as frozen.
            peaceful: exceptions with which a rank may leave like one that has finished.
        """
        self._world, self._peaceful = world, peaceful
        self._timeout = timeout_s
        self._place: tuple[int, str, float] = (0, "starting", time.monotonic())
        self._watch: Watch | None = None

    def at(self, step: int, phase: str) -> None:
        """Note what this rank begins: a step, and a phase that fits behind "while", such as ``waiting for data``."""
        self._place = (step, phase, time.monotonic())

    def __enter__(self) -> Pulse:
        if self._world.size == 1:
            return self
        host = socket.gethostname()
        listener: socket.socket | None = None

        def meet_here() -> Meeting:
            nonlocal listener
            listener, meeting = open_meeting(self._world.size)
            return meeting

        meeting: Meeting = from_main_rank(meet_here)
        watch = Watch(self, self._world, self._timeout, host, meeting, listener)
        problem = watch.begin()
        found: list[tuple[str, str | None]] = gather_objects((host, problem))
        unheard = [f"rank {rank} (host {host}): {why}" for rank, (host, why) in enumerate(found) if why is not None]
        if unheard and self._world.is_main:
            print(
                f"warning: {len(unheard)} of {self._world.size} ranks cannot reach rank 0 at "
                f"{' or '.join(meeting.addresses)}, port {meeting.port}; should one of them be lost, only a time-out "
                f"ends the run. {unheard[0]}",
                file=sys.stderr,
                flush=True,
            )
        # When rank 0 is lost, one rank of each host says so.
        here = [rank for rank, (its, _) in enumerate(found) if its == host and rank != 0]
        watch.tells = self._world.rank in (0, min(here, default=0))
        if problem is None:
            self._watch = watch
            farewells.append(self._last_words)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        how = how_left(error, self._peaceful)
        self._watch.leave(how, first_line(error) if how is not Left.DONE and error is not None else "")
        with contextlib.suppress(ValueError):
            farewells.remove(self._last_words)

    def _last_words(self, reason: str) -> None:
        """This process is about to end, for a reason of its own."""
        if self._watch is not None:
            self._watch.leave(Left.RAISED, reason)

    def now_at(self) -> tuple[int, str, float]:
        """Step, phase and seconds in it."""
        step, phase, since = self._place
        return step, phase, time.monotonic() - since

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint, None where there is none. Raises LookupError while the run has not said."""
        if self.newest is None:
            raise LookupError("no run has set newest")
        return self.newest()
