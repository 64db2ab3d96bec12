"""The end of a process whose training thread hangs and cannot raise."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LOST_STATUS = 69
"""Exit status of a run that a lost rank or a stalled loader ended (sysexits' EX_UNAVAILABLE)."""

farewells: list[Callable[[str], None]] = []
"""Called with the reason before `end_process` ends this process, so that other ranks can be told."""

_ending = threading.Lock()


def end_process(message: str, *, tell: bool = True) -> NoReturn:
    """End this process now, from any thread, with `LOST_STATUS`; its loader processes too.

    Args:
        message: why, for the user and the other ranks.
        tell: whether this rank is the one that tells the user.
    """
    if not _ending.acquire(blocking=False):
        while True:  # another thread is at it
            time.sleep(60)
    # The hanging thread may hold a stream's lock.
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1)
    if tell:
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))
    for farewell in farewells:
        with contextlib.suppress(Exception):
            farewell(message)
    _silence()  # the training thread may wake up at the death of its loader, and would have the last word
    kill_loader_processes()
    os._exit(LOST_STATUS)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _silence() -> None:
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def kill_loader_processes() -> None:
    """Kill the processes that `multiprocessing` has started here, and whatever these have started."""
    with contextlib.suppress(Exception):  # the list may change under our eyes
        for child in multiprocessing.active_children():
            if child.pid is not None:
                for process in (child.pid, *_descendants(child.pid)):
                    with contextlib.suppress(OSError):
                        os.kill(process, signal.SIGKILL)


def _descendants(parent: int) -> list[int]:
    """Processes that a process has started, and theirs; none where the system does not tell."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state ppid …; the name may hold anything.
            parents[int(status.parent.name)] = int(status.read_text(errors="replace").rpartition(")")[2].split()[1])
    found, new = [], [parent]
    while new:
        new = [process for process, its in parents.items() if its in new]
        found += new
    return found
