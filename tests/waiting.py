"""Waiting that does not depend on how busy the machine is, and ports that nobody takes by chance."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

LONG = 600.0
"""Seconds that nothing takes that will happen at all: importing torch beside a full suite has taken 75."""

_PORTS = range(10_000, 32_000)
"""Below those that systems hand out to outgoing connections, of which a busy machine makes many at any time."""


def wait_until(happened: Callable[[], object], said: Callable[[], object] = lambda: "it did not happen") -> None:
    """Look until something has happened; fails with what ``said`` returns after `LONG`, or when ``happened`` fails."""
    deadline = time.monotonic() + LONG
    while not happened():
        assert time.monotonic() < deadline, said()
        time.sleep(0.005)


def free_port() -> int:
    """Return a port for a process that begins to listen some time later.

    A port that the system chooses is one of those it may give to a connection meanwhile.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


def holding(after: int) -> dict[str, str]:
    """Return the variables that let a command wait after so many steps; see `hold_plugin`."""
    path = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    return {"MMD2V_PLUGINS": "hold_plugin", "HOLD_AFTER": str(after), "PYTHONPATH": os.pathsep.join(path)}
