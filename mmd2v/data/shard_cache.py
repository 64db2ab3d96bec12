"""A bounded folder of files that all processes of a node share: shards brought from elsewhere, and their indexes.

Three rules keep it sound when any process may be killed at any time:

- A file has its name only when it is complete: it is written under a temporary name and renamed.
- Who brings a file holds an exclusive ``flock`` on ``.NAME.lock``; who reads one holds a shared ``flock`` on the file
  itself, and only files that nobody holds are evicted. The kernel releases the locks of a dead process.
- The length of ``.NAME.lock`` (a hole, no bytes) is the room reserved for what is on its way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmd2v.data.damage import DamageKind
from mmd2v.data.shard_index import INDEX_SUFFIX
from mmd2v.errors import UserError, disk_message

_LOCK = ".lock"
_PART = ".part"
_FAILED = ".failed"
FAILURE_KEPT = 60.0  # seconds for which a shard that could not be fetched is not tried again
_TAIL = 60  # characters of a file name that show what it is

_held: set[int] = set()  # descriptors of exclusive locks of this process


def _release_in_child() -> None:
    """A forked child shares its parent's locks; it would keep them when the parent dies."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


class NoRoom(Exception):
    """Everything else in the cache is in use."""

    def __init__(self, needed: int, used: int, limit: int) -> None:
        super().__init__(f"needed {needed:,} bytes, {used:,} of {limit:,} are in use")
        self.needed = needed
        self.used = used
        self.limit = limit


def default_folder() -> str:
    """$MMD2V_CACHE, else a folder of this user in the temporary folder."""
    return os.environ.get("MMD2V_CACHE") or os.path.join(tempfile.gettempdir(), f"mmd2v-cache-{os.getuid()}")


def cache_name(address: str, version: str = "") -> str:
    """Name of the file that keeps what is at an address; ``version`` tells apart what was there at other times."""
    digest = hashlib.sha256(f"{address}\0{version}".encode("utf-8", "surrogateescape")).hexdigest()[:20]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", address.partition("?")[0])[-_TAIL:].lstrip("._-")
    return f"{digest}-{readable}"


class ShardCache:
    """The folder.

    Attributes:
        folder: where it is.
        limit: most bytes it may hold.
    """

    def __init__(self, folder: str | None, limit: int) -> None:
        """Open, or make, the folder; None: `default_folder`.

        Raises:
            UserError: the folder cannot be made or written, or belongs to somebody else.
        """
        self.folder = Path(os.path.expanduser(folder or default_folder()))
        self.limit = limit
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder), self._exclusive():
                pass
        except OSError as error:
            raise UserError(f"data.source.cache_dir: {self.folder} cannot be written: {disk_message(error)}") from None
        if folder is None and self.folder.stat().st_uid != os.getuid():
            # The temporary folder is everybody's: another user could have put shards of their own there.
            raise UserError(f"data.source.cache_dir: {self.folder} belongs to another user; name a folder of your own")

    def path(self, name: str) -> str:
        """Where an entry is, or will be."""
        return str(self.folder / name)

    def open(self, name: str) -> int | None:
        """Open an entry for reading, which keeps it from being evicted as long as it is open; None: not there."""
        try:
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        if os.fstat(handle).st_nlink == 0:  # evicted between the two calls
            os.close(handle)
            return None
        self.touch(handle)
        return handle

    def touch(self, entry: int | str) -> None:
        """Note that an entry (its descriptor or name) is in use now."""
        with suppress(OSError):
            os.utime(entry if isinstance(entry, int) else self.folder / entry)

    def remove(self, name: str) -> None:
        """Forget an entry."""
        with suppress(FileNotFoundError):
            os.unlink(self.folder / name)

    def claim(self, name: str) -> Claim | None:
        """Take the right to bring an entry; None: somebody else is at it, or just was."""
        path = self.folder / f".{name}{_LOCK}"
        handle = self._open_lock(path)
        if not _lock(handle, path):
            _close(handle)
            return None
        claim = Claim(self, name, handle)
        if (self.folder / name).exists():
            claim.release()
            return None
        return claim

    def put(self, name: str, data: bytes) -> None:
        """Keep a small file; where there is no room for it, it is left out."""
        with suppress(NoRoom, OSError), self._exclusive():
            self._make_room(len(data), "")
            part = self.folder / f".{name}.{uuid.uuid4().hex}{_PART}"
            part.write_bytes(data)
            os.replace(part, self.folder / name)

    def failed(self, name: str, kind: DamageKind, message: str) -> None:
        """Remember for a while that an entry cannot be fetched, so that no process tries it for each sample."""
        with suppress(OSError):
            part = self.folder / f".{name}.{uuid.uuid4().hex}{_PART}"
            part.write_text(json.dumps({"kind": kind, "message": message}))
            os.replace(part, self.folder / f".{name}{_FAILED}")

    def failure(self, name: str) -> tuple[DamageKind, str] | None:
        """What `failed` was told a short while ago."""
        path = self.folder / f".{name}{_FAILED}"
        try:
            age = time.time() - path.stat().st_mtime
            if age > FAILURE_KEPT:
                path.unlink()
                return None
            record = json.loads(path.read_text())
            return DamageKind(record["kind"]), f"{record['message']} (seen {max(0, age):.0f} s ago)"
        except (OSError, ValueError, KeyError):
            return None

    def usage(self) -> int:
        """Bytes of all entries."""
        used = 0
        for entry in self._entries():
            with suppress(FileNotFoundError):
                used += entry.stat().st_size
        return used

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock of the whole folder: to count, evict and reserve."""
        handle = self._open_lock(self.folder / _LOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            _close(handle)

    def _open_lock(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            handle = os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody tidied up
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, flags, 0o600)
        _held.add(handle)
        return handle

    def _make_room(self, needed: int, owner: str) -> None:
        """Evict until ``needed`` bytes fit; call it under `_exclusive`. ``owner``: whose reservation does not count.

        Raises:
            NoRoom: they do not fit.
        """
        used = self._sweep(owner)
        entries: list[tuple[bool, float, int, str]] = []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                found = entry.stat()
                used += found.st_size
                # An index is a thousandth of its shard, and spares a fetch when samples are counted.
                entries.append((entry.name.endswith(INDEX_SUFFIX), found.st_mtime, found.st_size, entry.name))
        if used + needed <= self.limit:
            return
        for _, _, size, name in sorted(entries):
            if self._evict(name):
                used -= size
                if used + needed <= self.limit:
                    return
        raise NoRoom(needed, used, self.limit)

    def _sweep(self, owner: str) -> int:
        """Remove what killed processes left behind; bytes that the living have reserved, but for ``owner``."""
        reserved = 0
        parts: list[str] = []
        alive: set[str] = set()
        with os.scandir(self.folder) as entries:
            hidden = [entry for entry in entries if entry.name.startswith(".") and entry.name != _LOCK]
        for entry in hidden:
            with suppress(FileNotFoundError):
                if entry.name.endswith(_PART):
                    parts.append(entry.name)
                elif entry.name.endswith(_FAILED):
                    if time.time() - entry.stat().st_mtime > FAILURE_KEPT:
                        os.unlink(entry.path)
                elif entry.name.endswith(_LOCK):
                    name = entry.name[1 : -len(_LOCK)]
                    if name == owner or not self._remove_dead_lock(entry.path):
                        alive.add(name)
                        reserved += entry.stat().st_size if name != owner else 0
        for part in parts:
            name = part[1:].rsplit(".", 2)[0]
            with suppress(FileNotFoundError):
                if name not in alive and time.time() - os.stat(self.folder / part).st_mtime > FAILURE_KEPT:
                    os.unlink(self.folder / part)
        return reserved

    def _remove_dead_lock(self, path: str) -> bool:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        _held.add(handle)
        try:
            if dead := _lock(handle, Path(path)):
                os.unlink(path)
            return dead
        finally:
            _close(handle)

    def _evict(self, name: str) -> bool:
        try:
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(self.folder / name)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
        return True


class Claim:
    """The right of one process to bring one entry. Use as a context manager."""

    def __init__(self, cache: ShardCache, name: str, handle: int) -> None:
        self.cache = cache
        self.name = name
        self.reserved = 0
        self._handle = handle
        os.ftruncate(handle, 0)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def temporary(self) -> str:
        """A new path to write to. Each attempt has its own: one that was abandoned may still be writing."""
        return str(self.cache.folder / f".{self.name}.{uuid.uuid4().hex}{_PART}")

    def reserve(self, size: int) -> None:
        """Make sure that there is room for ``size`` bytes in all; raises `NoRoom`."""
        if size <= self.reserved:
            return
        with self.cache._exclusive():
            self.cache._make_room(size, self.name)
            os.ftruncate(self._handle, size)
            self.reserved = size

    def commit(self, temporary: str) -> int:
        """Give a finished file its name; returns it open for reading, which keeps it from being evicted."""
        handle = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(handle)
        os.replace(temporary, self.cache.folder / self.name)
        with suppress(FileNotFoundError):
            os.unlink(self.cache.folder / f".{self.name}{_FAILED}")
        return handle

    def release(self) -> None:
        """Give the right back."""
        # Unlinked before it is closed, so that no other process locks a name that is about to go.
        with suppress(FileNotFoundError):
            os.unlink(self.cache.folder / f".{self.name}{_LOCK}")
        _close(self._handle)


def _lock(handle: int, path: Path) -> bool:
    """Try to lock an open lock file; False: somebody holds it, or it is no longer the one at ``path``."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _close(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked just after the file was opened would keep it locked
    _held.discard(handle)
    os.close(handle)
