"""Data sets of WebDataset shards: which files they are, how many samples each holds, and random access to a sample.

``mmd2v data pack`` writes two small files beside the shards, so that a data set of many shards opens without reading
them: ``shards.json`` (`mmd2v.data.manifest`) and, a shard, its index (`mmd2v.data.shard_index`). Shards
without them are scanned instead.

Shapes: S shards, R samples (rows) of one shard.
"""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from mmd2v.config.schema import SourceConfig
from mmd2v.data.addresses import PIPE, display, expand_shards, is_remote, split_address
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.manifest import MANIFEST_NAME, ManifestEntry
from mmd2v.data.places import SIZES_NAME, Places
from mmd2v.data.remote import RemoteShards
from mmd2v.data.shard_cache import FAILURE_KEPT
from mmd2v.data.shard_index import IMAGE_SUFFIXES, INDEX_SUFFIX, RawSample, ShardIndex
from mmd2v.errors import UserError
from mmd2v.progress import Progress

__all__ = [
    "IMAGE_SUFFIXES",
    "INDEX_SUFFIX",
    "RawSample",
    "ShardIndex",
    "ShardSet",
    "expand_shards",
]

_CAPTIONS_AT_ONCE = 256  # samples whose captions are requested together
_INDEXES_AT_ONCE = 16  # requests for indexes under way at the same time


class ShardSet:
    """A data set: its shards, their sample counts, and random access to samples.

    Holds the paths, arrays of what manifests tell, and the indexes and open files of the ``cache`` shards used last:
    its memory does not grow with the number of samples. Reads come from one thread; a forked or unpickled copy opens
    files of its own.

    Attributes:
        paths: S shard files or addresses.
        counts: int64 [S], samples of each shard; with a limit, shards after it count 0.
        is_remote: whether some of them are no local files.
        source: how those are fetched.
        tolerant: see `__init__`.
    """

    def __init__(
        self,
        spec: str | Sequence[str],
        limit: int | None = None,
        cache: int = 2,
        *,
        source: SourceConfig | None = None,
        tolerant: bool = False,
    ) -> None:
        """Find the shards and count their samples.

        Counts come from ``shards.json``, else from webdataset's ``sizes.json`` beside the shards, else from a shard's
        index, else from a scan, for which a remote shard must be fetched.

        Args:
            spec: see `expand_shards`.
            limit: use the first N samples.
            cache: shards kept open.
            source: how shards that are no local files are fetched; none: the defaults.
            tolerant: of a shard that is cut off, read the samples in front of the cut; a shard that its manifest lists
                and that is missing is damage of its samples and no error of the set.

        Raises:
            UserError: a shard is missing or cannot be counted, or there is no sample at all.
        """
        self.source = source if source is not None else SourceConfig()
        self.tolerant = tolerant
        self._cache_size = max(1, cache)
        self._forget()
        places = Places(self.source)
        self.paths = expand_shards(spec, places, absent="keep" if tolerant else "refuse")
        self.is_remote = any(map(is_remote, self.paths))
        self._sizes = np.zeros(0, np.int64)
        self._digests = b""
        self.counts = self._count(places, limit)
        self._ends = np.cumsum(self.counts)
        if len(self) == 0:
            raise UserError(
                f"shards: found no sample in {display(self.paths[0])} and {len(self.paths) - 1} further shards"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    # ----------------------------------------------------------------------------- counting samples

    def _count(self, places: Places, limit: int | None) -> np.ndarray:
        """int64 [S]: from the folders' manifests, else from each shard's index; shards past the limit stay unread."""
        counts = self._read_manifests(places)
        left = sys.maxsize if limit is None else limit
        unknown = np.flatnonzero(counts < 0).tolist()
        if limit is None:
            self._fetch_indexes(unknown)
        with ExitStack() as stack:
            progress: Progress | None = None
            for place, shard in enumerate(unknown):
                before = int(counts[:shard].sum()) if limit is not None else 0
                if before >= left:
                    break
                if not is_remote(self.paths[shard]):
                    counts[shard] = len(ShardIndex.open(self.paths[shard], tolerant=self.tolerant))
                    continue
                index = self._remote_index(shard) if self.source.access == "range" else self._remote.index(shard)
                if index is None:
                    if progress is None:
                        what = "fetching shards to count their samples"
                        progress = stack.enter_context(Progress(what, len(unknown), unit="shards"))
                        progress.advance(place)
                    self.prefetch([s for s in unknown[place : place + 1 + self.source.prefetch] if s > shard])
                    index, handle = self._remote.open(shard)
                    self._remote.close(shard, handle)
                counts[shard] = len(index)
                if progress is not None:
                    progress.advance()
        self.prefetch([])
        counts = np.maximum(counts, 0)  # behind the limit, some are still unknown
        if limit is not None:
            counts = np.clip(limit - (np.cumsum(counts) - counts), 0, counts)
        return counts

    def _read_manifests(self, places: Places) -> np.ndarray:
        """int64 [S] samples of each shard by its manifest, -1 where none tells; sets sizes and checksums."""
        samples: list[int] = []
        sizes: list[int] = []
        digests: list[bytes] = []
        # Of links that are signed one by one, none is a key to the manifest: it is not asked for.
        queries: dict[str, str | None] = {}
        for path in self.paths:
            folder, _, query = _split(path)
            if queries.setdefault(folder, query) != query:
                queries[folder] = None
        at, known = None, {}
        entry: ManifestEntry | None
        for path in self.paths:
            folder, name, _ = _split(path)
            if folder != at:
                at, query = folder, queries[folder]
                known = {} if query is None else places.counts(folder + query)
            entry = known.get(name)
            samples.append(-1 if entry is None else entry.samples)
            sizes.append(-1 if entry is None else entry.bytes)
            sha256 = None if entry is None else entry.sha256
            digests.append(bytes(32) if sha256 is None else _digest(sha256, path))
        self._sizes = np.array(sizes, np.int64)
        self._digests = b"".join(digests) if any(map(any, digests)) else b""
        return np.array(samples, np.int64)

    def _fetch_indexes(self, shards: Sequence[int]) -> None:
        """Bring the indexes of remote shards into the cache, many at a time; what goes wrong is met again later."""
        remote = [shard for shard in shards if is_remote(self.paths[shard])]
        if len(remote) < 2:
            return

        def fetch(shard: int) -> None:
            with suppress(Damage):
                self._remote.index(shard)

        _ = self._remote
        with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
            list(pool.map(fetch, remote))

    # --------------------------------------------------------------------------------------- access

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row) of the ``position``-th sample in file order."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, int(position - (self._ends[shard] - self.counts[shard]))

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a shard, opening it if it is not among those used last."""
        return self._entry(shard)[0]

    @property
    def reads_ranges(self) -> bool:
        """Whether samples are requested by byte ranges, which `read_many` does side by side."""
        return self.is_remote and self.source.access == "range"

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch remote shards that are needed next, soonest first; they stay in the cache until they are read.

        Each call replaces the one before; it is cheap when it names the same shards. Local shards need nothing.
        """
        if not self.is_remote or self.source.access != "cache":
            return
        if self._remote.prefetch([shard for shard in shards if is_remote(self.paths[shard])]):
            # What is open cannot be evicted, not even for another process.
            while self._release():
                pass

    def read(self, shard: int, row: int, *, images: bool = True, arrays: Sequence[str] = ()) -> RawSample:
        """Read one sample.

        Args:
            shard: which shard.
            row: which of its samples.
            images: False reads no image, and a sample may lack one.
            arrays: keys of the arrays to read.

        Raises:
            Damage: the shard or the sample cannot be read.
            UserError: a setting of `source` must be changed.
        """
        (sample,) = self.read_many([(shard, row)], images=images, arrays=arrays)
        if isinstance(sample, Damage):
            raise sample
        return sample

    def read_many(
        self, places: Sequence[tuple[int, int]], *, images: bool = True, arrays: Sequence[str] = ()
    ) -> list[RawSample | Damage]:
        """Read the samples at some (shard, row); one that cannot be read is its `Damage` instead of raising it.

        Under ``access: range`` their bytes are requested side by side.

        Raises:
            UserError: a setting of `source` must be changed.
        """
        samples: list[RawSample | Damage | None] = [None] * len(places)
        ranges: list[tuple[int, int, int]] = []
        waiting: list[tuple[int, ShardIndex]] = []
        for place, (shard, row) in enumerate(places):
            try:
                index, handle = self._entry(shard)
                if row >= len(index):
                    where = f"{index.name}: sample {row} of {self.counts[shard]}"
                    raise Damage(DamageKind.SHARD_TRUNCATED, f"{where}: the shard ends before it")
                if handle is not None:
                    samples[place] = index.read(row, handle, images=images, arrays=arrays)
                else:
                    ranges.append((shard, *index.span(row, images=images, arrays=arrays)))
                    waiting.append((place, index))
            except Damage as damage:
                samples[place] = damage
        for (place, index), data in zip(waiting, self._remote.read_ranges(ranges) if ranges else [], strict=True):
            try:
                samples[place] = (
                    data
                    if isinstance(data, Damage)
                    else index.parse(places[place][1], data, images=images, arrays=arrays)
                )
            except Damage as damage:
                samples[place] = damage
        return [sample for sample in samples if sample is not None]

    def captions(self) -> Iterator[tuple[str, ...]]:
        """Yield the captions of every sample in file order, without reading images."""
        for shard, count in enumerate(self.counts.tolist()):
            if self.is_remote:
                self.prefetch(range(shard, min(shard + 1 + self.source.prefetch, len(self.paths))))
            for start in range(0, count, _CAPTIONS_AT_ONCE):
                rows = range(start, min(start + _CAPTIONS_AT_ONCE, count))
                for sample in self.read_many([(shard, row) for row in rows], images=False):
                    if isinstance(sample, Damage):
                        raise sample
                    yield sample.captions

    # ---------------------------------------------------------------------------------- open shards

    def _entry(self, shard: int) -> tuple[ShardIndex, int | None]:
        """The index of a shard, and its open file (None: its samples are read where they are)."""
        if self._process != os.getpid():
            self._after_fork()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if (failure := self._failures.get(shard)) is not None:
            # Each of its samples would go through the same retries or scan.
            if time.monotonic() < failure[0]:
                raise Damage(failure[1].kind, str(failure[1]))
            del self._failures[shard]
        while len(self._open) >= self._cache_size:
            self._close_entry(next(iter(self._open)))
        try:
            index, handle = self._open_shard(shard)
        except Damage as damage:
            self._failures[shard] = (time.monotonic() + FAILURE_KEPT, damage)
            raise
        self._open[shard] = (index, handle)
        return index, handle

    def _open_shard(self, shard: int) -> tuple[ShardIndex, int | None]:
        path = self.paths[shard]
        handle: int | None
        if not is_remote(path):
            index = ShardIndex.open(path, tolerant=self.tolerant)
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise Damage(DamageKind.SHARD_UNREADABLE, f"{path}: cannot be read: {error.strerror}") from None
        elif self.source.access == "range":
            index, handle = self._remote_index(shard), None
        else:
            index, handle = self._remote.open(shard, self._release)
        if len(index) < self.counts[shard] and not self.tolerant:
            self._close_file(shard, handle)
            raise Damage(
                DamageKind.SHARD_UNREADABLE,
                f"{index.name}: found {len(index)} samples, expected {self.counts[shard]} by the {MANIFEST_NAME} or "
                f"{SIZES_NAME} beside it: the shard was replaced; pack again or delete that file",
            )
        return index, handle

    def _remote_index(self, shard: int) -> ShardIndex:
        index = self._remote.index(shard)
        if index is None:
            where = display(self.paths[shard])
            raise UserError(
                f"data.source.access: range needs an index beside each shard, as `mmd2v data pack` writes it, but "
                f"there is no {where.rpartition('/')[2]}{INDEX_SUFFIX} beside {where}; use cache, or pack again"
            )
        if 0 <= self._sizes[shard] != index.size:
            raise Damage(
                DamageKind.SHARD_UNREADABLE,
                f"{index.name}: its index is of {index.size:,} bytes, expected {self._sizes[shard]:,} by the "
                f"{MANIFEST_NAME} beside it: the shard was replaced",
            )
        return index

    @property
    def _remote(self) -> RemoteShards:
        """What fetches in this process."""
        if self._process != os.getpid():
            self._after_fork()
        if self._fetcher is None:
            self._fetcher = RemoteShards(self.paths, self._sizes, self._digests, self.source, tolerant=self.tolerant)
        self._fetcher.tolerant = self.tolerant
        return self._fetcher

    def _release(self) -> bool:
        """Close the remote shard that was used longest ago among those no longer needed; False: there is none."""
        for shard, (_, handle) in self._open.items():
            if handle is not None and is_remote(self.paths[shard]) and not self._remote.is_wanted(shard):
                self._close_entry(shard)
                return True
        return False

    def _close_entry(self, shard: int) -> None:
        _, handle = self._open.pop(shard)
        self._close_file(shard, handle)

    def _close_file(self, shard: int, handle: int | None) -> None:
        if self._fetcher is not None and is_remote(self.paths[shard]):
            self._fetcher.close(shard, handle)
        elif handle is not None:
            os.close(handle)

    def close(self) -> None:
        """Close the shards held open, and end what is fetched in the background."""
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        if self._process != os.getpid():
            self._after_fork()
        while self._open:
            self._close_entry(next(iter(self._open)))
        if self._fetcher is not None:
            self._fetcher.shut_down(wait=wait)
            self._fetcher = None

    def __del__(self) -> None:
        # Not for threads: when the interpreter ends, they never get to run again.
        if hasattr(self, "_open"):
            self._close(wait=False)

    def _forget(self) -> None:
        """Start without anything that belongs to a process."""
        self._process = os.getpid()
        self._open: OrderedDict[int, tuple[ShardIndex, int | None]] = OrderedDict()
        self._fetcher: RemoteShards | None = None
        self._failures: dict[int, tuple[float, Damage]] = {}

    def _after_fork(self) -> None:
        """Drop what a forked process inherited: threads are gone, and the fork closed what the cache had open."""
        for shard, (_, handle) in self._open.items():
            if handle is not None and not is_remote(self.paths[shard]):
                os.close(handle)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_open", "_fetcher", "_failures", "_process")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _split(path: str) -> tuple[str, str, str]:
    """(folder, name, query) of a path or address."""
    if path.startswith(PIPE):
        return PIPE, path, ""
    return split_address(path) if is_remote(path) else (*os.path.split(path), "")


def _digest(sha256: str, path: str) -> bytes:
    try:
        return bytes.fromhex(sha256)
    except ValueError:
        raise UserError(f"{display(path)}: its {MANIFEST_NAME} holds {sha256!r}, expected a SHA-256") from None
