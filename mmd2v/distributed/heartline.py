"""What ranks say to each other of their state: small JSON lines over TCP, of which nothing is believed unchecked."""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import socket
from dataclasses import dataclass, fields
from typing import Any

_LONGEST_LINE = 8192  # bytes, the line's end included
_LONGEST_TEXT = 1000  # characters; JSON needs six bytes for some
_MOST_UNSENT = 1 << 16  # bytes kept for a peer that does not read
_KINDS = ("hello", "beat", "bye", "end")
_LARGEST = 1 << 53


@dataclass(frozen=True)
class Message:
    """One line. ``hello`` opens a connection, ``bye`` is a rank's farewell, ``end`` ends the whole job."""

    kind: str
    token: str = ""
    """Of ``hello``: the job's secret."""
    rank: int = 0
    host: str = ""
    pid: int = 0
    step: int = 0
    phase: str = ""
    seconds: float = 0.0
    """How long the sender has been in its phase."""
    how: str = ""
    """Of ``bye``: a value of `verdict.Left`."""
    text: str = ""
    """Of ``bye``: the error; of ``end``: why the job ends."""


_TYPES: dict[str, type] = {
    field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in fields(Message)
}


def encode(message: Message) -> bytes:
    """Return the line of a message; long texts are cut."""
    values = {name: getattr(message, name) for name in _TYPES}
    kept = {name: value[:_LONGEST_TEXT] if isinstance(value, str) else value for name, value in values.items() if value}
    # What UTF-8 cannot hold (names of files may) becomes an escape, which is JSON again.
    return json.dumps(kept, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of a line. Raises ValueError for anything that `encode` does not write."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(values, dict) or values.get("kind") not in _KINDS:
        raise ValueError(f"no message: expected an object whose kind is one of {', '.join(_KINDS)}")
    return Message(**{name: _checked(name, value) for name, value in values.items()})


def _checked(name: str, value: Any) -> Any:
    expected = _TYPES.get(name)
    if expected is None:
        raise ValueError(f"unknown field {name!r:.50}")
    if expected is float and type(value) is int:
        value = float(min(value, _LARGEST))
    if type(value) is not expected:
        raise ValueError(f"{name}: found {type(value).__name__}, expected {expected.__name__}")
    if expected is str and len(value) > _LONGEST_TEXT:
        raise ValueError(f"{name}: longer than {_LONGEST_TEXT} characters")
    if expected is not str and not (math.isfinite(value) and 0 <= value <= _LARGEST):
        raise ValueError(f"{name}: found {value!r:.50}, expected a number from 0 on")
    return value


def is_greeting(message: Message, token: str, size: int) -> bool:
    """Whether a message opens the connection of a rank of this job, which has ``size`` ranks."""
    return (
        message.kind == "hello"
        and hmac.compare_digest(message.token.encode(errors="replace"), token.encode())
        and 0 <= message.rank < size
    )


class Line:
    """One connection that never blocks.

    Attributes:
        open: whether the peer may still say something.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # no TCP
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.open = True
        self._unread, self._unsent = b"", b""

    def send(self, message: Message) -> None:
        """Say something, as far as the peer reads; a peer that is gone is noticed by `receive`."""
        if len(self._unsent) < _MOST_UNSENT:
            self._unsent += encode(message)
        with contextlib.suppress(OSError):  # BlockingIOError: it waits until the next call
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def receive(self) -> list[Message]:
        """What the peer has said meanwhile. ``open`` is false afterwards if it hung up or said what nobody says."""
        try:
            while self.open and len(self._unread) <= 16 * _LONGEST_LINE:
                heard = self.socket.recv(_LONGEST_LINE)
                self.open = bool(heard)
                self._unread += heard
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, self._unread = self._unread.split(b"\n")
        messages = []
        try:
            if any(len(line) >= _LONGEST_LINE for line in (*lines, self._unread)):
                raise ValueError("too long")
            messages.extend(map(decode, lines))
        except ValueError:
            self.open = False
        return messages

    def close(self) -> None:
        """Hang up."""
        self.open = False
        self.socket.close()
