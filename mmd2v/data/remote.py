"""The remote shards of one data set in one process: brought into the node's cache, ahead of time where possible.

An object of this module belongs to the process that made it, like its threads and locks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from mmd2v.config.schema import SourceConfig
from mmd2v.data.addresses import PIPE, display, join_address, split_address, without_secrets
from mmd2v.data.damage import Damage
from mmd2v.data.fetch import Cancelled, Incomplete, ask, download, is_unreachable, read_bytes, read_if_there, retrying
from mmd2v.data.shard_cache import Claim, NoRoom, ShardCache, cache_name
from mmd2v.data.shard_cache import close as close_entry
from mmd2v.data.shard_index import INDEX_SUFFIX, ShardIndex
from mmd2v.errors import UserError, disk_message

_WAIT = 0.05  # seconds between two looks whether another process is done
_GROWTH = 64_000_000  # bytes by which room is reserved for a shard of unknown size
_RANGES_AT_ONCE = 16  # requests of one batch that are under way at the same time
_GB = 10**9
# What file systems of fsspec tell in `info`, beside the size, that changes with the content.
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "Digest", "content_md5", "md5Hash", "crc32c", "checksum", "generation")
_VERSION_KEYS += ("Last-Modified", "LastModified", "last_modified", "updated", "mtime")


class RemoteShards:
    """Opens remote shards by way of the cache, or reads samples where they are."""

    def __init__(
        self, paths: Sequence[str], sizes: Sequence[int], digests: bytes, config: SourceConfig, *, tolerant: bool
    ) -> None:
        """Describe the shards.

        Args:
            paths: S addresses (or local paths, which are never asked for).
            sizes: bytes of each; -1: unknown.
            digests: 32 bytes SHA-256 of each (zeros: unknown), or empty: all unknown.
            config: how they are fetched.
            tolerant: see `mmd2v.data.shards.ShardSet`.

        Raises:
            UserError: the cache folder cannot be used.
        """
        self.paths = paths
        self.config = config
        self.tolerant = tolerant
        self.cache = ShardCache(config.cache_dir, int(config.cache_gb * _GB))
        self._sizes = sizes
        self._digests = digests
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._wanted: list[int] = []
        """What is to be fetched ahead, soonest needed first."""
        self._busy: set[int] = set()
        self._pinned: dict[int, int] = {}
        """Shard → descriptor that keeps it from being evicted until it is used."""
        self._used: set[int] = set()
        """Shards that the caller has open."""
        self._passed: set[int] = set()
        """Wanted shards that could not be fetched ahead; whoever needs them is told why."""
        self._threads: list[threading.Thread] = []
        self._versions: dict[int, str] = {}
        """Shard of which no manifest tells → what tells it from other content at its address; empty: unknown."""
        # Some servers tell files apart by nothing but the query.
        signed = any("?" in path for path in paths)
        self._named_by_query = signed and len(set(map(without_secrets, paths))) < len(paths)

    # ------------------------------------------------------------------------------------ one shard

    def open(self, shard: int, release: Callable[[], bool] = lambda: False) -> tuple[ShardIndex, int]:
        """Return the index of a shard and its whole file, open for reading, fetching it if need be.

        Args:
            shard: which.
            release: closes a shard that the caller keeps open and no longer needs; False: there is none.

        Raises:
            Damage: it cannot be fetched or read.
            UserError: a setting must be changed.
        """
        with self._lock:
            self._used.add(shard)
            handle = self._pinned.pop(shard, None)
        try:
            if handle is None:
                handle = self._bring(shard, lambda: release() or self._unpin_last(), wait=True)
                assert handle is not None
            return self._index_of(shard), handle
        except OSError as error:
            self.close(shard, handle)
            raise UserError(
                f"data.source.cache_dir: {self.cache.folder} cannot be used: {disk_message(error)}"
            ) from error
        except BaseException:
            self.close(shard, handle)
            raise

    def close(self, shard: int, handle: int | None) -> None:
        """Let go of a shard that `open` returned."""
        with self._lock:
            self._used.discard(shard)
        if handle is not None:
            close_entry(handle)

    def index(self, shard: int) -> ShardIndex | None:
        """The index of a shard by itself, from the cache or from beside the shard; None: there is none.

        Raises:
            Damage: it cannot be fetched, or is damaged.
        """
        address = self.paths[shard]
        name = self._name(shard) + INDEX_SUFFIX
        if os.path.exists(self.cache.path(name)):
            with suppress(Damage):  # evicted just now, or of an older version
                return self._load_index(shard, name)
        if address.startswith(PIPE):
            return None
        folder, base, query = split_address(address)
        data = read_if_there(join_address(folder + query, base + INDEX_SUFFIX), self.config, self._stop)
        if data is None:
            return None
        return self._keep_index(shard, data)

    def read_ranges(self, places: Sequence[tuple[int, int, int]]) -> list[memoryview | Damage]:
        """Read (shard, offset, bytes) from where the shards are, several at a time; a failure is its Damage."""

        def read(place: tuple[int, int, int]) -> memoryview | Damage:
            shard, offset, size = place
            name = self._name(shard)
            if (failure := self.cache.failure(name)) is not None:
                return Damage(*failure)
            address = self.paths[shard]

            def attempt() -> bytes:
                return read_bytes(address, self.config, self._stop, offset, offset + size)

            try:
                return memoryview(bytearray(retrying(attempt, address, self.config, self._stop)))
            except Damage as damage:
                if is_unreachable(damage.__cause__):  # else the next range may well come
                    self.cache.failed(name, damage.kind, str(damage))
                return damage

        if len(places) == 1:
            return [read(places[0])]
        with ThreadPoolExecutor(min(_RANGES_AT_ONCE, max(1, len(places)))) as pool:
            return list(pool.map(read, places))

    # -------------------------------------------------------------------------------- ahead of time

    def prefetch(self, shards: Sequence[int]) -> bool:
        """Fetch these in the background, in this order; what an earlier call asked for and this one does not is let go.

        Returns:
            False when nothing changed, which is cheap.
        """
        with self._lock:
            if list(shards) == self._wanted:
                return False
            self._wanted = list(shards)
            wanted = set(shards)
            self._passed.clear()  # there may be room now
            unneeded = [self._pinned.pop(shard) for shard in list(self._pinned) if shard not in wanted]
            missing = min(self.config.prefetch, len(wanted)) - len(self._threads)
            for _ in range(missing):
                # Daemons: a process that ends does not wait for a download that nobody will use.
                thread = threading.Thread(target=self._work, daemon=True, name="mmd2v-prefetch")
                self._threads.append(thread)
                thread.start()
        for handle in unneeded:
            close_entry(handle)
        return True

    def is_wanted(self, shard: int) -> bool:
        """Whether the last `prefetch` named this shard."""
        return shard in self._wanted

    def _work(self) -> None:
        """Fetch what is wanted; a thread of `prefetch`."""
        try:
            self._fetch_wanted()
        finally:
            with self._lock, suppress(ValueError):
                self._threads.remove(threading.current_thread())

    def _fetch_wanted(self) -> None:
        """Fetch until nothing is left to do; a shard that another process is at comes later."""
        elsewhere: set[int] = set()
        while not self._stop.is_set():
            with self._lock:
                skipped = self._busy | self._passed | self._used
                missing = [s for s in self._wanted if s not in self._pinned and s not in skipped]
                todo = [s for s in missing if s not in elsewhere]
                if todo:
                    self._busy.add(todo[0])
                if not missing:
                    # Before the lock is let go: a `prefetch` must not count on a thread that is about to end.
                    self._threads.remove(threading.current_thread())
                    return
            if not todo:
                elsewhere.clear()
                self._stop.wait(_WAIT)
                continue
            shard = todo[0]
            handle: int | None = None
            try:
                handle = self._bring(shard, lambda: False, wait=False)
                if handle is None:
                    elsewhere.add(shard)
            except (UserError, Cancelled, NoRoom, OSError):
                # Whoever needs the shard will meet the same and say so.
                with self._lock:
                    self._passed.add(shard)
            finally:
                with self._lock:
                    self._busy.discard(shard)
                    if handle is not None and shard in self._wanted and not self._stop.is_set():
                        self._pinned[shard] = handle
                        handle = None
                if handle is not None:
                    close_entry(handle)

    def _unpin_last(self) -> bool:
        """Let go of the fetched shard that is needed last; False: there is none."""
        with self._lock:
            shard = next((s for s in reversed(self._wanted) if s in self._pinned), None)
            if shard is None:
                return False
            handle = self._pinned.pop(shard)
            self._passed.add(shard)
        close_entry(handle)
        return True

    def shut_down(self, *, wait: bool = True) -> None:
        """End all fetches and let everything go; ``wait`` for the threads to be gone."""
        self._stop.set()
        with self._lock:
            self._wanted = []
            handles = list(self._pinned.values())
            self._pinned.clear()
            threads = list(self._threads)
        for handle in handles:
            close_entry(handle)
        for thread in threads if wait else ():
            thread.join()

    # ------------------------------------------------------------------------------------ the cache

    def _name(self, shard: int) -> str:
        """Name of a shard in the cache: it changes with what is known of the content, not with a signature."""
        path = self.paths[shard]
        digest = self._digest(shard)
        if digest is not None:
            version = digest.hex()
        elif self._sizes[shard] >= 0:
            version = str(self._sizes[shard])
        else:
            version = self._version(shard)
            if not version:
                return cache_name(path)
        return cache_name(path if self._named_by_query else without_secrets(path), version)

    def _version(self, shard: int) -> str:
        """What its file system tells about the content of a shard at once, asked for one time; empty: nothing."""
        if shard not in self._versions:
            path = self.paths[shard]
            version = ""
            if not path.startswith(PIPE):
                # Whatever is wrong is met again, and told, when the shard is fetched.
                with suppress(Exception):
                    found = ask(path, self.config, self._stop, lambda system, place: system.info(place))
                    version = "".join(f"{key}={found[key]} " for key in _VERSION_KEYS if found.get(key) is not None)
                    if version and found.get("size") is not None:
                        version += f"size={found['size']}"
            self._versions[shard] = version
        return self._versions[shard]

    def _digest(self, shard: int) -> bytes | None:
        found = self._digests[32 * shard : 32 * shard + 32]
        return found if any(found) else None

    def _bring(self, shard: int, release: Callable[[], bool], *, wait: bool) -> int | None:
        """Open the cached file of a shard, fetching it if it is not there.

        Returns:
            Its descriptor; None when another process (or thread) is at it and ``wait`` is False.

        Raises:
            Damage, UserError: as `open`.
            NoRoom: the cache is full of what is in use; only without ``wait``.
        """
        name = self._name(shard)
        while not self._stop.is_set():
            if (handle := self.cache.open(name)) is not None:
                return handle
            if (failure := self.cache.failure(name)) is not None:
                raise Damage(*failure)
            claim = self.cache.claim(name)
            if claim is not None:
                with claim:
                    return self._fetch(shard, claim, release, wait)
            if (handle := self.cache.open(name)) is not None:
                return handle
            if not wait:
                return None
            self._stop.wait(_WAIT)
        raise Cancelled

    def _fetch(self, shard: int, claim: Claim, release: Callable[[], bool], wait: bool) -> int:
        address = self.paths[shard]
        expected = int(self._sizes[shard])
        self._reserve(claim, address, max(0, expected), release, wait)

        def grew(size: int) -> None:
            if size > claim.reserved:
                self._reserve(claim, address, size + _GROWTH, release, wait)

        def attempt() -> str:
            temporary = claim.temporary()
            try:
                download(address, temporary, self.config, self._stop, grew)
                _verify(temporary, expected, self._digest(shard))
                self._reserve(claim, address, os.stat(temporary).st_size, release, wait)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            return temporary

        try:
            temporary = retrying(attempt, address, self.config, self._stop)
            try:
                self._make_index(shard, temporary)
            except BaseException:
                os.unlink(temporary)
                raise
        except Damage as damage:
            self.cache.failed(claim.name, damage.kind, str(damage))
            raise
        return claim.commit(temporary)

    def _reserve(self, claim: Claim, address: str, size: int, release: Callable[[], bool], wait: bool) -> None:
        """Reserve room; if there is none, let go of what this process no longer needs, then wait for the others."""
        waited = 0.0
        while True:
            try:
                claim.reserve(size)
                return
            except NoRoom as full:
                if not wait:
                    raise
                if size <= self.cache.limit and release():
                    continue
                # Others let their shards go as they get on; not for ever, since they may be waiting for this process.
                if size > self.cache.limit or waited >= self.config.timeout:
                    raise UserError(
                        f"data.source.cache_gb: found {self.config.cache_gb:g} ({full.limit:,} bytes), but "
                        f"{display(address)} needs {full.needed:,} bytes while shards of "
                        f"{full.used:,} bytes are in use on this node; expected at least "
                        f"{(full.needed + full.used) / _GB:.3g}, or fewer data.shuffle_shards"
                    ) from None
            if self._stop.wait(_WAIT):
                raise Cancelled
            waited += _WAIT

    def _make_index(self, shard: int, path: str) -> None:
        """Put the index of a shard that was just fetched into the cache; raises a Damage when it is no readable tar."""
        size = os.stat(path).st_size
        known = None
        if self._sizes[shard] >= 0:  # packed by us, most likely: reading its index is cheaper than a scan
            with suppress(Damage):
                known = self.index(shard)
        if known is None or known.size != size:
            self._scan(shard, path)

    def _index_of(self, shard: int) -> ShardIndex:
        """The index of a shard that is in the cache."""
        path = self.cache.path(self._name(shard))
        with suppress(Damage):
            index = self._load_index(shard, self._name(shard) + INDEX_SUFFIX)
            if index.size == os.stat(path).st_size:
                return index
        return self._scan(shard, path)

    def _scan(self, shard: int, path: str) -> ShardIndex:
        name = self._name(shard)
        where = display(self.paths[shard])
        try:
            index = ShardIndex.scan(path, name=where)
        except Damage:
            if not self.tolerant:
                raise
            # Not kept: whoever is strict must meet the damage too.
            index = ShardIndex.scan(path, name=where, tolerant=True)
        else:
            self.cache.put(name + INDEX_SUFFIX, index.to_bytes())
        index.path = self.cache.path(name)
        return index

    def _load_index(self, shard: int, name: str) -> ShardIndex:
        index = ShardIndex.load(
            self.cache.path(name), self.cache.path(self._name(shard)), name=display(self.paths[shard])
        )
        self.cache.touch(name)
        return index

    def _keep_index(self, shard: int, data: bytes) -> ShardIndex:
        """Check an index that was read from beside its shard, and keep it."""
        where = display(self.paths[shard])
        index = ShardIndex.from_bytes(data, where + INDEX_SUFFIX, self.cache.path(self._name(shard)), name=where)
        self.cache.put(self._name(shard) + INDEX_SUFFIX, data)
        return index


def _verify(path: str, expected: int, digest: bytes | None) -> None:
    """Compare a fetched file with what its manifest promises; raises `Incomplete`."""
    found = os.stat(path).st_size
    if 0 <= expected != found:
        raise Incomplete(f"found {found:,} bytes, expected {expected:,} by its manifest")
    if digest is not None:
        with open(path, "rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").digest()
        if actual != digest:
            raise Incomplete(f"found SHA-256 {actual.hex()}, expected {digest.hex()} by its manifest")
