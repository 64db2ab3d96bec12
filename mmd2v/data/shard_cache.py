"""A bounded folder of files that all processes of a node share: shards brought from elsewhere, and their indexes.

Three rules keep it sound when any process may be killed at any time:

- A file has its name only when it is complete: it is written under a temporary name and renamed.
- Who brings a file holds an exclusive ``flock`` on ``.NAME.lock``; who reads one holds a shared ``flock`` on the file
  itself, and only files that nobody holds are evicted. The kernel releases the locks of a dead process.
- The length of ``.NAME.lock`` (a hole, no bytes) is the room reserved for what is on its way.

``.lock``, which guards all counting, holds a bound of the bytes taken, so that the folder (of a hundred thousand
indexes, perhaps) is gone through only when that bound says that it is full, and every few minutes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import struct
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmd2v.data.addresses import display
from mmd2v.data.damage import DamageKind
from mmd2v.data.shard_index import INDEX_SUFFIX
from mmd2v.errors import UserError, disk_message

_LOCK = ".lock"
_PART = ".part"
_FAILED = ".failed"
FAILURE_KEPT = 60.0  # seconds for which a shard that could not be fetched is not tried again
_TAIL = 60  # characters of a file name that show what it is
_BOUND = struct.Struct("<qd")  # of .lock: bytes taken at most, and when the folder was gone through last
_SWEPT_EVERY = 300.0  # seconds after which what dead processes left is looked for
_SPARE = 64  # a small file that finds the cache full makes room for others: up to this part of the cache
_FULL_FOR = 1.0  # seconds for which small files are left out once there was no room for one

_held: set[int] = set()  # descriptors of this process that hold locks


def _release_in_child() -> None:
    """A forked child shares its parent's locks and open files; it would keep them when the parent dies."""
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
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", display(address).partition("?")[0])[-_TAIL:].lstrip("._-")
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
            UserError: the folder cannot be made or written, its files cannot be locked, or it belongs to somebody else.
        """
        self.folder = Path(os.path.expanduser(folder or default_folder()))
        self.limit = limit
        self._full_until = 0.0
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".probe.", suffix=_PART) as probe:
                if (problem := _lock_problem(probe.name)) is not None:
                    raise UserError(
                        f"data.source.cache_dir: {self.folder}: files cannot be locked there ({problem}), expected a "
                        "local disk"
                    )
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
            handle = _open_shared(str(self.folder / name))
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_nlink == 0:  # evicted between the two calls
            close(handle)
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
            close(handle)
            return None
        claim = Claim(self, name, handle)
        if (self.folder / name).exists():
            claim.release()
            return None
        return claim

    def put(self, name: str, data: bytes) -> None:
        """Keep a small file; where there is no room for it, it is left out."""
        if time.monotonic() < self._full_until:
            return  # to go through a folder full of what is in use for each would take hours
        try:
            with suppress(OSError), self._exclusive() as lock:
                self._take(lock, len(data), spare=self.limit // _SPARE)
                self._write(data, name, name)
        except NoRoom:
            self._full_until = time.monotonic() + _FULL_FOR

    def failed(self, name: str, kind: DamageKind, message: str) -> None:
        """Remember for a while that an entry cannot be fetched, so that no process tries it for each sample."""
        with suppress(OSError):
            self._write(json.dumps({"kind": kind, "message": message}).encode(), name, f".{name}{_FAILED}")

    def _write(self, data: bytes, name: str, target: str) -> None:
        """Write a small file; one that cannot be written leaves nothing behind."""
        part = self.folder / f".{name}.{uuid.uuid4().hex}{_PART}"
        try:
            part.write_bytes(data)
            os.replace(part, self.folder / target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

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
    def _exclusive(self) -> Iterator[int]:
        """Hold the lock of the whole folder, to count, evict and reserve; its descriptor."""
        handle = self._open_lock(self.folder / _LOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            close(handle)

    def _open_lock(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            handle = os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody tidied up
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, flags, 0o600)
        _held.add(handle)
        return handle

    def _take(self, lock: int, needed: int, owner: str = "", reserved: int = 0, spare: int = 0) -> None:
        """Count ``needed`` bytes as taken, evicting where they do not fit; call it under `_exclusive`.

        Args:
            lock: descriptor of `_exclusive`.
            needed: bytes in all.
            owner: whose earlier reservation they replace.
            reserved: bytes of that reservation.
            spare: bytes that are evicted beyond it, if anything is, so that the next call need not.

        Raises:
            NoRoom: they do not fit.
        """
        record = os.pread(lock, _BOUND.size, 0)
        if len(record) == _BOUND.size:
            taken, swept = _BOUND.unpack(record)
            taken += needed - reserved
            if 0 <= time.time() - swept < _SWEPT_EVERY and taken <= self.limit:
                os.pwrite(lock, _BOUND.pack(taken, swept), 0)
                return
        try:
            taken = self._make_room(needed, owner, spare) + needed
        except NoRoom as full:
            os.pwrite(lock, _BOUND.pack(full.used + reserved, time.time()), 0)
            raise
        os.pwrite(lock, _BOUND.pack(taken, time.time()), 0)

    def _give_back(self, size: int) -> None:
        """Count so many bytes as free again."""
        with suppress(OSError), self._exclusive() as lock:
            record = os.pread(lock, _BOUND.size, 0)
            if len(record) == _BOUND.size:
                taken, swept = _BOUND.unpack(record)
                os.pwrite(lock, _BOUND.pack(max(0, taken - size), swept), 0)

    def _make_room(self, needed: int, owner: str, spare: int) -> int:
        """Evict until ``needed`` bytes fit, see `_take`; bytes that are in use then.

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
            return used
        for _, _, size, name in sorted(entries):
            if self._evict(name):
                used -= size
                if used + needed + spare <= self.limit:
                    return used
        if used + needed <= self.limit:
            return used
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
            close(handle)

    def _evict(self, name: str) -> bool:
        try:
            # Open for writing: where locks are those of NFS, an exclusive one needs it.
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC)
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
        self._written = 0
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
        with self.cache._exclusive() as lock:
            self.cache._take(lock, size, self.name, self.reserved)
            os.ftruncate(self._handle, size)
            self.reserved = size

    def commit(self, temporary: str) -> int:
        """Give a finished file its name; returns it open for reading, which keeps it from being evicted."""
        handle = _open_shared(temporary)
        try:
            os.utime(handle)
            os.replace(temporary, self.cache.folder / self.name)
        except BaseException:
            close(handle)
            raise
        self._written = os.fstat(handle).st_size
        with suppress(FileNotFoundError):
            os.unlink(self.cache.folder / f".{self.name}{_FAILED}")
        return handle

    def release(self) -> None:
        """Give the right back."""
        # Unlinked before it is closed, so that no other process locks a name that is about to go.
        with suppress(FileNotFoundError):
            os.unlink(self.cache.folder / f".{self.name}{_LOCK}")
        close(self._handle)
        if self.reserved != self._written:
            self.cache._give_back(self.reserved - self._written)


def _lock(handle: int, path: Path) -> bool:
    """Try to lock an open lock file; False: somebody holds it, or it is no longer the one at ``path``."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _open_shared(path: str) -> int:
    """Open a file for reading, under a shared lock."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _held.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except BaseException:
        _held.discard(handle)
        os.close(handle)
        raise
    return handle


def close(handle: int) -> None:
    """Unlock and close a descriptor that this module opened; a forked child has none of them."""
    try:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked just after the file was opened would keep it locked
    finally:
        _held.discard(handle)
        os.close(handle)


def _lock_problem(path: str) -> str | None:
    """Why the locks of a file cannot be relied upon, as some file systems of clusters have it; None: they can."""
    handles: list[int] = []
    try:
        for flags in (os.O_RDWR, os.O_RDWR, os.O_RDONLY):
            handles.append(os.open(path, flags | os.O_CLOEXEC))
        first, second, reader = handles
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _can_lock(second, fcntl.LOCK_EX) or _can_lock(reader, fcntl.LOCK_SH):
            return "two can hold one lock"
        fcntl.flock(first, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not _can_lock(reader, fcntl.LOCK_SH):
            return "no two can share a lock"
        if _can_lock(second, fcntl.LOCK_EX):
            return "two can hold one lock"
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for handle in handles:
            os.close(handle)
    return None


def _can_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
