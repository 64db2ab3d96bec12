"""A scheduler that takes the machine back: its signals are noted, and answered by the run between two steps.

SLURM sends SIGTERM when a job is preempted, requeued or out of time, and SIGUSR1 or another one before that where
``--signal`` asks for it. A run that has saved leaves with `REQUEUE_STATUS`, by which the job script knows that the same
command should run again.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

REQUEUE_STATUS = 75
"""EX_TEMPFAIL of sysexits.h, "try again later": no shell and no signal gives it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run has answered a signal and is to be continued later. The message is what the user should read.

    Raised on every rank at the same step.
    """


class StopSignals:
    """Context manager that notes the first of `STOP_SIGNALS` in place of what they do to a process; later ones change
    nothing.

    Inside another one it shares what that has noted: a command can begin to listen before the run exists. Outside of
    the main thread, where Python installs no handlers, nothing is noted.

    On leaving, the handlers of before return, unless the process is about to end on a signal's account (one was noted,
    or `Preempted` passes): then both signals stay ignored, because a launcher or scheduler that sends another one to a
    process on its way out would replace its exit status.
    """

    _active: StopSignals | None = None

    def __init__(self) -> None:
        self._asked: int = 0
        self._outer: StopSignals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def number(self) -> int:
        """Number of the signal that was noted; 0 while there is none."""
        return self._asked if self._outer is None else self._outer.number

    @property
    def asked(self) -> str | None:
        """Name of the signal that was noted, such as ``"SIGTERM"``; None while there is none."""
        return signal_name(self.number) if self.number else None

    def __enter__(self) -> StopSignals:
        self._outer, StopSignals._active = StopSignals._active, self
        if self._outer is None and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        StopSignals._active = self._outer
        ending = bool(self._asked) or isinstance(error, Preempted)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number


def signal_name(number: int) -> str:
    """Return ``"SIGTERM"`` for 15."""
    return signal.Signals(number).name
