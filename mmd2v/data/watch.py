"""Never a silent stall: what every loader worker is doing, and a thread that says so when no batch comes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any

import torch
from torch.utils.data import get_worker_info

from mmd2v.distributed.processes import end_process


class Stage(IntEnum):
    """What a worker is busy with."""

    STARTING = 0
    READING = 1
    DECODING = 2
    TOKENIZING = 3
    WAITING = 4
    """Its batches are finished and not yet asked for."""


_WORDS = {
    Stage.STARTING: "starting",
    Stage.READING: "reading",
    Stage.DECODING: "decoding a sample of",
    Stage.TOKENIZING: "tokenising a batch that ends in",
    Stage.WAITING: "waiting to be asked",
}


class WorkerStates:
    """One row of shared memory a worker: stage, data set, shard, time of the last change. Written without locks."""

    def __init__(self, workers: int) -> None:
        """``workers`` is at least 1: the training process counts as worker 0 where there is no other."""
        self._rows = torch.zeros(max(1, workers), 4, dtype=torch.float64).share_memory_()
        self._rows[:, 3] = time.monotonic()
        self._array = self._rows.numpy()  # twenty times as fast to write a number to

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._array = self._rows.numpy()  # pickled by itself, it would be a copy

    def enter(self, stage: Stage, set_: int = -1, shard: int = -1) -> None:
        """Say what this worker begins; -1 keeps the set and shard of before."""
        info = get_worker_info()
        row = self._array[info.id if info is not None else 0]
        row[0] = stage
        if shard >= 0:
            row[1], row[2] = set_, shard
        # CLOCK_MONOTONIC is one clock for all processes of a machine.
        row[3] = time.monotonic()

    def describe(self, worker: int, name: Callable[[int, int], str]) -> str:
        """``worker 2, which has been reading SHARD for 61 s``; ``name`` maps (set, shard) to a path."""
        stage, set_, shard, since = self._rows[worker].tolist()
        what = _WORDS[Stage(int(stage))]
        where = f" {name(int(set_), int(shard))}" if int(stage) not in (Stage.STARTING, Stage.WAITING) else ""
        return f"worker {worker}, which has been {what}{where} for {time.monotonic() - since:.0f} s"


class Due(Enum):
    """What the length of a wait asks for."""

    NOTHING = "nothing"
    WARNING = "warning"
    END = "end"


class Patience:
    """How long somebody has waited and what is due then. Is told the time: has neither a clock nor a thread.

    Attributes:
        tick: seconds from one look to the next.
        waited: seconds of the wait at the last look, without those in which nobody can have looked.
    """

    LATE = 2.0
    """Seconds beyond a tick after which the looking thread itself must have been stopped."""

    def __init__(self, seconds: float, end_after: float | None, now: float) -> None:
        """Begin to look at ``now``; ``seconds`` and ``end_after`` are those of `Watchdog`."""
        self.tick = min(1.0, seconds / 4, (end_after or seconds) / 4)
        self.waited = 0.0
        self._seconds, self._end_after = seconds, end_after
        self._looked = now
        self._since: float | None = None
        self._told, self._excused = 0, 0.0

    def look(self, now: float, since: float | None) -> Due:
        """Look at ``now`` at a wait that began at ``since`` (None: nobody waits) and say what is due."""
        # A late tick: the job was suspended, and the data with it.
        pause = now - self._looked if now - self._looked > self.tick + self.LATE else 0.0
        self._looked = now
        if since != self._since:
            self._told, self._excused, self._since = 0, 0.0, since
        if since is None:
            self.waited = 0.0
            return Due.NOTHING
        self._excused += min(pause, now - since)
        self.waited = now - since - self._excused
        if self._end_after is not None and self.waited >= self._end_after:
            return Due.END
        if self.waited >= (self._told + 1) * self._seconds:
            self._told = max(self._told + 1, int(self.waited / self._seconds))
            return Due.WARNING
        return Due.NOTHING


class Watchdog:
    """Warns while somebody waits for longer than ``seconds``. Use as a context manager and `expect` / `arrived`."""

    def __init__(self, seconds: float, describe: Callable[[], str], end_after: float | None = None) -> None:
        """Watch over one thread.

        Args:
            seconds: from one warning to the next.
            describe: says, when asked, what is being waited for.
            end_after: seconds after which the whole process ends; None: never. For a thread that waits where nothing
                can be raised in it.
        """
        self.seconds = seconds
        self._describe, self._end_after = describe, end_after
        self._since: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mmd2v-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def expect(self) -> None:
        """Begin to wait."""
        self._since = time.monotonic()

    def arrived(self) -> None:
        """End the wait."""
        self._since = None

    def _watch(self) -> None:
        patience = Patience(self.seconds, self._end_after, time.monotonic())
        while not self._end.wait(patience.tick):
            since = self._since  # before the clock, which is then not behind it
            due = patience.look(time.monotonic(), since)
            if due is Due.END:
                end_process(stalled(self._describe()))
            if due is Due.WARNING:
                told = f"no batch for {patience.waited:.0f} s: waiting for {self._describe()}"
                print(told, file=sys.stderr, flush=True)


def stalled(awaited: str) -> str:
    """Say that data.stall_timeout has passed."""
    return f"data.stall_timeout: no batch in that time; waited for {awaited}"
