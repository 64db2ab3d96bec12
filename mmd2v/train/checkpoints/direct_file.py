"""A file that is written past the page cache where the file system allows it, and hashed on the way.

Bytes that go through the page cache are copied into memory that the kernel must find first, which costs the cores more
than hashing them, and push out what others read. Removing such a file later gives all that memory back again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from threading import Event
from types import TracebackType

__all__ = ["DirectFile"]

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_BUFFER = 8 << 20
_BLOCK = 4096  # what addresses, lengths and offsets are multiples of; no device in use asks for more
_PIECE = 1 << 20  # bytes that are still in the core's cache when they are hashed


class DirectFile:
    """A new file for one writer. On leaving the context without an error all of it is on the disk.

    Raises OSError as `open` and `write` do, and InterruptedError in `write` once ``abandoned`` is set. Copying, hashing
    and writing let other threads run.
    """

    def __init__(self, path: Path, abandoned: Event) -> None:
        self._abandoned = abandoned
        self._file = _open(path)
        self._buffer = mmap.mmap(-1, _BUFFER)  # pages, so at an address that direct writes can take
        self._view = memoryview(self._buffer)
        self._used = 0
        self.size = 0
        self.digest = hashlib.sha256()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._send(self._used)
                os.fsync(self._file)
        finally:
            os.close(self._file)
            self._view.release()
            self._buffer.close()

    def write(self, data: bytes | memoryview) -> int:
        """Add ``data``; it is copied when this returns."""
        if self._abandoned.is_set():
            raise InterruptedError("the checkpoint was abandoned")
        data = memoryview(data).cast("B")
        start = 0
        while start < len(data):
            piece = data[start : start + min(_PIECE, _BUFFER - self._used)]
            self._view[self._used : self._used + len(piece)] = piece
            self.digest.update(piece)
            self._used += len(piece)
            start += len(piece)
            if self._used == _BUFFER:
                self._send(_BUFFER)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: what asks for it goes on writing."""

    def _send(self, size: int) -> None:
        """Write the first ``size`` bytes of the buffer, and empty it."""
        sent = 0
        while sent < size:
            if sent % _BLOCK or (size - sent) % _BLOCK:  # the end of the file, or after a write that was cut short
                _use_cache(self._file)
            try:
                sent += os.write(self._file, self._view[sent:size])
            except OSError:
                if not _use_cache(self._file):
                    raise
        self._used = 0


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    if _DIRECT:
        with contextlib.suppress(OSError):  # some file systems refuse; any other error shows itself below
            return os.open(path, flags | _DIRECT, 0o666)
    return os.open(path, flags, 0o666)


def _use_cache(file: int) -> bool:
    """Let the page cache take the rest of the file; return whether it did not before."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if not _DIRECT or not flags & _DIRECT:
        return False
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
    return True
