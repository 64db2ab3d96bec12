"""The connections between the ranks' threads: rank 0's to all others, and another rank's to rank 0."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmd2v.distributed.finding_rank0 import GREETING, Meeting, reach
from mmd2v.distributed.heartline import Line, Message, is_greeting
from mmd2v.distributed.processes import farewells

_MOST_STRANGERS = 4096

PARTING = 1.0
"""Seconds that `Switchboard.part` takes at most."""


class Heard(NamedTuple):
    """What a rank has said."""

    rank: int
    messages: list[Message]
    hello: Message | None = None
    """Its greeting, when it has just come."""
    hung_up: bool = False
    """Whether it will say no more."""


class Switchboard:
    """Takes in who belongs to the job, and carries what is said. Nothing here blocks but `connect` and `part`."""

    def __init__(
        self, rank: int, size: int, meeting: Meeting, listener: socket.socket | None, greeting: Callable[[], Message]
    ) -> None:
        """``listener`` is rank 0's server, None on other ranks; ``greeting`` says who this rank is."""
        self._size, self._meeting, self._listener, self._greeting = size, meeting, listener, greeting
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, Line] = {}
        self._strangers: dict[Line, float] = {}
        self._known = {rank}
        _of_this_process.add(self)

    def connect(self) -> Message | None:
        """Begin to listen, on rank 0; on another connect to it and return its greeting. Raises OSError."""
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
            return None
        try:
            line, hello = reach(self._meeting, self._size, self._greeting)
        except OSError:
            self.close()
            raise
        self._take_in(line, hello.rank)
        return hello

    def wait(self, seconds: float) -> list[selectors.SelectorKey]:
        """Wait for somebody to speak, so long at most; return what `receive` needs to know of it."""
        return [key for key, _ in self._selector.select(seconds)]

    def receive(self, ready: list[selectors.SelectorKey], now: float) -> Iterator[Heard]:
        """Say what the ranks among those who speak have said; let newcomers in that belong to the job."""
        for who in (key.data for key in ready):
            if who is None:
                self._accept(now)
            elif isinstance(who, Line):
                yield from self._examine(who)
            else:
                messages = self._lines[who].receive()
                yield Heard(who, messages, hung_up=not self._lines[who].open)
        self._dismiss_strangers(now)

    def send(self, message: Message) -> None:
        """Say something to all who are connected."""
        for line in self._lines.values():
            line.send(message)

    def hang_up(self, rank: int) -> None:
        """End the connection to one rank."""
        line = self._lines.pop(rank)
        self._selector.unregister(line.socket)
        line.close()

    def part(self, last: Message) -> None:
        """Say the last word, let it arrive (closing at once could take it back) and close everything."""
        end = time.monotonic() + PARTING
        for line in self._lines.values():
            line.send(last)
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_WR)
        if self._listener is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listener)
        while any(line.open for line in self._lines.values()) and (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                line = self._lines[key.data] if isinstance(key.data, int) else key.data
                line.receive()
                if not line.open:
                    self._selector.unregister(line.socket)
        self.close()

    def close(self) -> None:
        """Close every descriptor."""
        for line in (*self._lines.values(), *self._strangers):
            line.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _accept(self, now: float) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no more descriptors
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            connection.close()
            return
        line = Line(connection)
        self._strangers[line] = now
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _examine(self, line: Line) -> Iterator[Heard]:
        messages = line.receive()
        if not messages and line.open:
            return
        self._selector.unregister(line.socket)
        del self._strangers[line]
        greeting = next(iter(messages), None)
        known = greeting is None or greeting.rank in self._known
        if greeting is None or known or not is_greeting(greeting, self._meeting.token, self._size):
            line.close()
            return
        line.send(self._greeting())
        self._take_in(line, greeting.rank)
        yield Heard(greeting.rank, messages[1:], hello=greeting)

    def _take_in(self, line: Line, rank: int) -> None:
        self._known.add(rank)
        self._lines[rank] = line
        self._selector.register(line.socket, selectors.EVENT_READ, rank)

    def _dismiss_strangers(self, now: float) -> None:
        for line in [line for line, since in self._strangers.items() if now - since > GREETING]:
            self._selector.unregister(line.socket)
            del self._strangers[line]
            line.close()


_of_this_process: weakref.WeakSet[Switchboard] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked loader process must not keep the connections open after the death of its rank."""
    for switchboard in _of_this_process:
        switchboard.close()
    farewells.clear()


os.register_at_fork(after_in_child=_close_in_child)
