"""How the threads that watch over the ranks find that of rank 0, and know each other for members of one job."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from mmd2v.distributed.heartline import Line, Message, is_greeting

GREETING = 20.0
"""Seconds a stranger has to show that it belongs to the job."""

_MEETING = 30.0  # seconds a rank tries to reach rank 0


class Meeting(NamedTuple):
    """How ranks find rank 0."""

    addresses: list[str]
    port: int
    token: str


def open_meeting(size: int) -> tuple[socket.socket, Meeting]:
    """Return a server on this host for the other ranks of a job of ``size``, and what these must know of it."""
    listener = _listen(size)
    return listener, Meeting(_addresses(), listener.getsockname()[1], secrets.token_hex(16))


def reach(meeting: Meeting, size: int, greeting: Callable[[], Message]) -> tuple[Line, Message]:
    """Connect to rank 0 and greet each other; return the connection and rank 0's greeting.

    Raises OSError when that cannot be done in time.
    """
    end, pause = time.monotonic() + _MEETING, 0.1
    while True:
        for address in meeting.addresses:
            try:
                connection = socket.create_connection((address, meeting.port), timeout=5)
                return _greet(connection, meeting, size, greeting())
            except OSError as error:
                problem = error
        if time.monotonic() > end:
            raise problem
        time.sleep(pause)
        pause = min(2.0, 2 * pause)


def _greet(connection: socket.socket, meeting: Meeting, size: int, greeting: Message) -> tuple[Line, Message]:
    line = Line(connection)
    line.send(greeting)
    end = time.monotonic() + GREETING
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while line.open and (left := end - time.monotonic()) > 0:
            selector.select(left)
            for hello in line.receive():
                if is_greeting(hello, meeting.token, size) and hello.rank == 0:
                    return line, hello
    line.close()
    raise OSError("who answers there is not rank 0 of this job")


def _listen(backlog: int) -> socket.socket:
    """A server on a port that the system chooses, for every address of this host."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # switched off
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True, reuse_port=False
            )
    return socket.create_server(("", 0), backlog=backlog)


def _addresses() -> list[str]:
    """Where other ranks may find this host, the likeliest first."""
    return list(dict.fromkeys(filter(None, (os.environ.get("MASTER_ADDR"), socket.gethostname()))))
