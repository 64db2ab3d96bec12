"""Data sets of WebDataset shards: which files they are, how many samples each holds, and random access to a sample.

``mmd2v data pack`` writes two small files beside the shards, so that a data set of many shards opens without reading
them: ``shards.json`` (samples and bytes of each shard) and, a shard, its index (`mmd2v.data.shard_index`). Shards
without them are scanned instead.

Shapes: S shards, R samples (rows) of one shard.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmd2v.config.schema import SourceConfig
from mmd2v.data.addresses import expand_shards
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shard_index import IMAGE_SUFFIXES, INDEX_SUFFIX, RawSample, ShardIndex
from mmd2v.errors import UserError
from mmd2v.files import write_text

__all__ = [
    "IMAGE_SUFFIXES",
    "INDEX_SUFFIX",
    "MANIFEST_NAME",
    "ManifestEntry",
    "RawSample",
    "ShardIndex",
    "ShardSet",
    "expand_shards",
    "read_manifest",
    "write_manifest",
]

MANIFEST_NAME = "shards.json"
_VERSION = 1


class ShardSet:
    """A data set: its shards, their sample counts, and random access to samples.

    Holds the paths, one array of counts, and the indexes and open files of the ``cache`` shards used last: its memory
    does not grow with the number of samples.

    Attributes:
        paths: S shard files or addresses.
        counts: int64 [S], samples of each shard; with a limit, shards after it count 0.
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

        Args:
            spec: see `expand_shards`.
            limit: use the first N samples.
            cache: shards kept open.
            source: how shards that are no local files are fetched; none: the defaults.
            tolerant: of a shard that is cut off, read the samples in front of the cut; a shard that its manifest lists
                and that is missing is damage of its samples and no error of the set.
        """
        self.paths = expand_shards(spec)
        self.source = source if source is not None else SourceConfig()
        self.tolerant = tolerant
        self._cache_size = max(1, cache)
        self._open: OrderedDict[int, tuple[ShardIndex, int]] = OrderedDict()
        self.counts = self._count(limit)
        self._ends = np.cumsum(self.counts)
        if len(self) == 0:
            raise UserError(f"shards: found no sample in {self.paths[0]} and {len(self.paths) - 1} further shards")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _count(self, limit: int | None) -> np.ndarray:
        """int64 [S]: from the folders' manifests, else from each shard's index; shards past the limit stay unread."""
        manifests: dict[str, dict[str, Any]] = {}
        counts = np.zeros(len(self.paths), np.int64)
        left = limit
        for place, path in enumerate(self.paths):
            if left is not None and left <= 0:
                break
            folder, name = os.path.split(path)
            if folder not in manifests:
                manifests[folder] = read_manifest(folder)
            known = manifests[folder].get(name)
            count = known[0] if known is not None else len(ShardIndex.open(path, tolerant=self.tolerant))
            counts[place] = count if left is None else min(count, left)
            if left is not None:
                left -= count
        return counts

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row) of the ``position``-th sample in file order."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, int(position - (self._ends[shard] - self.counts[shard]))

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a shard, opening it if it is not among those used last."""
        return self._entry(shard)[0]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch these shards, which are needed next; local ones need nothing."""

    def read(self, shard: int, row: int, *, images: bool = True) -> RawSample:
        """Read one sample; see `ShardIndex.read`."""
        index, handle = self._entry(shard)
        return index.read(row, handle, images=images)

    def read_many(self, places: Sequence[tuple[int, int]], *, images: bool = True) -> list[RawSample | Damage]:
        """Read the samples at some (shard, row); one that cannot be read is its `Damage` instead of raising it."""
        samples: list[RawSample | Damage] = []
        for shard, row in places:
            try:
                samples.append(self.read(shard, row, images=images))
            except Damage as damage:
                samples.append(damage)
        return samples

    def captions(self) -> Iterator[tuple[str, ...]]:
        """Yield the captions of every sample in file order, without reading images."""
        for shard, count in enumerate(self.counts.tolist()):
            for row in range(count):
                index, handle = self._entry(shard)
                yield index.read_captions(row, handle)

    def _entry(self, shard: int) -> tuple[ShardIndex, int]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.paths[shard]
        index = ShardIndex.open(path, tolerant=self.tolerant)
        if len(index) < self.counts[shard]:
            raise Damage(
                DamageKind.SHARD_UNREADABLE,
                f"{path}: found {len(index)} samples, expected {self.counts[shard]} by the "
                f"{MANIFEST_NAME} beside it: the shard was replaced; pack again or delete the {MANIFEST_NAME}",
            )
        while len(self._open) >= self._cache_size:
            _, (_, handle) = self._open.popitem(last=False)
            os.close(handle)
        self._open[shard] = (index, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._open[shard]

    def close(self) -> None:
        """Close the shards held open."""
        while self._open:
            os.close(self._open.popitem()[1][1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process; a spawned worker opens its own.
        return {**self.__dict__, "_open": OrderedDict()}


class ManifestEntry(NamedTuple):
    """What a manifest tells of a shard."""

    samples: int
    bytes: int
    sha256: str | None = None
    """In hexadecimal; None in manifests of earlier versions."""


def read_manifest(folder: str) -> dict[str, ManifestEntry]:
    """Read a folder's ``shards.json``: shard name → what it tells; empty when there is none."""
    path = os.path.join(folder, MANIFEST_NAME)
    if not os.path.exists(path):
        return {}
    record = _read_json(path)
    try:
        return {str(name): _manifest_entry(*entry) for name, entry in record["shards"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a shard manifest of this version; delete it to scan the shards") from None


def _manifest_entry(samples: Any, size: Any, sha256: Any = None) -> ManifestEntry:
    if sha256 is not None and not isinstance(sha256, str):
        raise TypeError(sha256)
    return ManifestEntry(int(samples), int(size), sha256)


def write_manifest(folder: str | Path, shards: Mapping[str, ManifestEntry]) -> None:
    """Write a folder's ``shards.json`` from shard name → what it tells: ``[samples, bytes, sha256]`` each."""
    entries = {name: list(entry) for name, entry in sorted(shards.items())}
    record = {"version": _VERSION, "samples": sum(entry.samples for entry in shards.values()), "shards": entries}
    write_text(Path(folder) / MANIFEST_NAME, json.dumps(record) + "\n")


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as handle:
            record = json.load(handle)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise UserError(f"{path}: found another format, expected a JSON object with version {_VERSION}")
    return record
