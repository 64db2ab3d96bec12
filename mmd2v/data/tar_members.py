"""Members of a tar, one after the other, with a clear error where the tar is damaged."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

from mmd2v.data.damage import Damage, DamageKind

_BLOCK = 512  # bytes of a tar block
_MOST_EMPTY = 100  # reads behind the end; tarfile itself needs a few

TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError)
"""What tarfile raises at damaged headers: they may name more bytes than a file, or memory, can have."""


def plain_members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an uncompressed tar by their headers alone, in a memory that does not grow.

    Raises:
        Damage: it is no tar, or ends early or is damaged behind the members yielded so far.
    """
    end, last = 0, ""
    try:
        size = os.stat(path).st_size
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if not 0 <= member.size <= size - member.offset_data:
                    raise EOFError(f"{member.name} is said to have {member.size:,} bytes, more than are left")
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header it has seen
                last = f" after {member.name}"
                if member.isfile():
                    yield member
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
        with open(path, "rb") as handle:
            handle.seek(end)
            block = handle.read(_BLOCK)
    except TAR_ERRORS as error:
        kind = DamageKind.SHARD_TRUNCATED if end else DamageKind.SHARD_UNREADABLE
        raise Damage(kind, f"{path}: no readable, uncompressed tar{last}: {_reason(error)}") from None
    except OSError as error:
        raise Damage(DamageKind.SHARD_UNREADABLE, f"{path}: cannot be read: {error.strerror}") from None
    if len(block) < _BLOCK:
        message = f"{path}: the tar ends early{last} (no end-of-archive mark): incomplete copy?"
        raise Damage(DamageKind.SHARD_TRUNCATED, message)
    if any(block):
        raise Damage(DamageKind.SHARD_UNREADABLE, f"{path}: the tar is damaged{last}: no header at byte {end:,}")


def _reason(error: BaseException) -> str:
    """What an error says; of a header that asks for more memory than there is, nothing."""
    return str(error) or "a header names more bytes than there can be"


def streamed_members(stream: IO[bytes], name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, content) of the files of a tar, compressed or not, that is read from its beginning to its end.

    A content must be read before the next one is asked for.

    Args:
        stream: the tar, buffered: its beginning tells how it is compressed.
        name: what messages call it.

    Raises:
        Damage: it is no tar, or damaged behind the members yielded so far; starts with ``name``.
    """
    last = ""
    try:
        watched = _Watched(decompressed(stream))
        with tarfile.open(fileobj=watched, mode="r|", tarinfo=_Header) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                last = f" after {member.name}"
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content
        # tarfile is content with an archive cut off between two members.
        if not watched.ends_in_zeros():
            raise EOFError("it ends without an end-of-archive mark: incomplete copy?")
    except READ_ERRORS as error:
        kind = DamageKind.SHARD_TRUNCATED if last else DamageKind.SHARD_UNREADABLE
        raise Damage(kind, f"{name}: no readable tar{last}: {_reason(error)}") from None


def decompressed(stream: IO[bytes]) -> IO[bytes]:
    """The content of a gzip, xz or bzip2 stream, which raises an error where it is cut off; others as they are."""
    start = stream.peek(6)[:6]  # type: ignore[attr-defined] # of every buffered stream
    for magic, module in _COMPRESSIONS.items():
        if start.startswith(magic):
            return module.open(stream)
    return stream


class _Header(tarfile.TarInfo):
    """A header; a damaged one is an error where tarfile would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a damaged header: {error}") from None


class _Watched:
    """A stream that remembers how it ended."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tail = b""
        self._empty = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._empty += not data
        if self._empty > _MOST_EMPTY:
            # tarfile would go on to the end of a member, which a damaged header may put anywhere.
            raise EOFError("it ends inside a member")
        self._tail = (self._tail + data)[-_BLOCK:]
        return data

    def ends_in_zeros(self) -> bool:
        """Read to the end; whether the last block is the zeros of a tar's end."""
        while self.read(1 << 16):
            pass
        return len(self._tail) == _BLOCK and not any(self._tail)


_COMPRESSIONS = {b"\x1f\x8b": gzip, b"\xfd7zXZ\0": lzma, b"BZh": bz2}

READ_ERRORS = (*TAR_ERRORS, lzma.LZMAError, zlib.error, OSError)
"""What reading a damaged archive raises."""
