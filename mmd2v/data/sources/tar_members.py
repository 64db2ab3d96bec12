"""Members of a tar, one after the other, with a clear error where the tar is damaged."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

from mmd2v.data.damage import Damage, DamageKind

_BLOCK = 512  # bytes of a tar block


def plain_members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an uncompressed tar by their headers alone, in a memory that does not grow.

    Raises:
        Damage: it is no tar, or ends early or is damaged behind the members yielded so far.
    """
    end, last = 0, ""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header it has seen
                last = f" after {member.name}"
                if member.isfile():
                    yield member
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
        with open(path, "rb") as handle:
            handle.seek(end)
            block = handle.read(_BLOCK)
    except (tarfile.TarError, EOFError, ValueError) as error:
        kind = DamageKind.SHARD_TRUNCATED if end else DamageKind.SHARD_UNREADABLE
        raise Damage(kind, f"{path}: no readable, uncompressed tar{last}: {error}") from None
    except OSError as error:
        raise Damage(DamageKind.SHARD_UNREADABLE, f"{path}: cannot be read: {error.strerror}") from None
    if len(block) < _BLOCK:
        message = f"{path}: the tar ends early{last} (no end-of-archive mark): incomplete copy?"
        raise Damage(DamageKind.SHARD_TRUNCATED, message)
    if any(block):
        raise Damage(DamageKind.SHARD_UNREADABLE, f"{path}: the tar is damaged{last}: no header at byte {end:,}")


def streamed_members(stream: IO[bytes], name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, content) of the files of a tar, compressed or not, that is read from its beginning to its end.

    A content must be read before the next one is asked for.

    Raises:
        Damage: it is no tar, or damaged behind the members yielded so far; starts with ``name``.
    """
    last = ""
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                last = f" after {member.name}"
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content
    except READ_ERRORS as error:
        kind = DamageKind.SHARD_TRUNCATED if last else DamageKind.SHARD_UNREADABLE
        raise Damage(kind, f"{name}: no readable tar{last}: {error}") from None


READ_ERRORS = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError)
"""What reading a damaged archive raises."""
