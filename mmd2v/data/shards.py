"""Data sets of WebDataset shards: which files they are, how many samples each holds, and random access to a sample.

A shard is an uncompressed tar in which one sample is a run of members with one key: an image, and its captions as
``.json`` (key ``captions`` or ``caption``) or ``.txt`` (a caption a line). ``mmd2v data pack`` writes two small files
beside the shards, so that a data set of many shards opens without reading them: ``shards.json`` (samples and bytes of
each shard) and, a shard, ``NAME.tar.idx.json`` (where each sample lies). Shards without them are scanned instead.

Shapes: S shards, R samples (rows) of one shard.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from mmd2v.data.captions import meta_captions, parse_meta, text_captions
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.errors import UserError, nearest
from mmd2v.files import write_text

MANIFEST_NAME = "shards.json"
INDEX_SUFFIX = ".idx.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_VERSION = 1
_BLOCK = 512  # bytes of a tar block
_IMAGE, _META, _TEXT = range(3)  # columns of ShardIndex.spans


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """List the shard files that a specification names.

    Args:
        spec: a folder of ``.tar`` files, a path with ``{000..007}`` braces or wildcards, or a list of these.

    Returns:
        Paths, sorted within each item of the specification, items in their given order.

    Raises:
        UserError: a file or folder is missing, a wildcard matches nothing, or a shard is named twice.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    if not items:
        raise UserError("shards: found an empty list, expected at least one folder or .tar file")
    found: list[str] = []
    for item in items:
        found += _expand_item(item)
    seen: set[str] = set()
    for path in found:
        if path in seen:
            raise UserError(f"shards: {path} is named twice in {items}")
        seen.add(path)
    return found


def _expand_item(item: str) -> list[str]:
    if "://" in item:
        raise UserError(f"shards: found the address {item}, expected a local path")
    item = os.path.expanduser(item)
    try:
        names = [item] if os.path.exists(item) else list(braceexpand.braceexpand(item))
    except ValueError as error:
        raise UserError(f"shards: unbalanced braces in {item!r}: {error}") from None
    paths: list[str] = []
    listing: dict[str, set[str]] = {}  # one listing a folder instead of a look-up a shard
    for name in names:
        if os.path.isdir(name):
            inside = sorted(entry for entry in os.listdir(name) if entry.endswith(".tar"))
            if not inside:
                raise UserError(f"shards: folder {name} holds no .tar file")
            paths += [os.path.join(name, entry) for entry in inside]
            continue
        if any(character in name for character in "*?[") and not os.path.exists(name):
            matches = glob.glob(name, recursive=True)
            if not matches:
                raise UserError(f"shards: no file matches {name}")
            paths += matches
            continue
        folder, base = os.path.split(name)
        if folder not in listing:
            if not os.path.isdir(folder or "."):
                raise UserError(f"shards: {name} not found: there is no folder {folder}{_nearest_path(folder)}")
            listing[folder] = set(os.listdir(folder or "."))
        if base not in listing[folder]:
            tars = [entry for entry in listing[folder] if entry.endswith(".tar")]
            raise UserError(f"shards: {name} not found.{nearest(base, tars)}")
        paths.append(name)
    return sorted(paths)


def _nearest_path(path: str) -> str:
    parent, base = os.path.split(path.rstrip("/"))
    return f".{nearest(base, os.listdir(parent or '.'))}" if os.path.isdir(parent or ".") else ""


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard."""

    key: str
    where: str
    """``"SHARD: sample KEY"``, for messages."""
    image: memoryview
    """Encoded bytes of the image, writable."""
    captions: tuple[str, ...]
    """At least one, none of them empty."""
    meta: dict[str, Any]
    """The sample's JSON object; empty when its captions came from a ``.txt``."""

    @property
    def id(self) -> str:
        """The stable id: the JSON's ``id`` if there is one, else the key."""
        return str(self.meta.get("id", self.key))


class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
        path: the tar file.
        keys: R keys.
        spans: int64 [R, 3, 2], byte offset and size of the image, the ``.json`` and the ``.txt``; offset -1: absent.
        size: bytes of the tar file.
    """

    def __init__(self, path: str, keys: list[str], spans: np.ndarray, size: int) -> None:
        self.path = path
        self.keys = keys
        self.spans = spans
        self.size = size

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def open(cls, path: str) -> ShardIndex:
        """Read ``PATH.idx.json``, or scan the tar's headers when there is none.

        Raises:
            UserError: the shard is missing, damaged, or not the one the index was made for.
        """
        index_path = path + INDEX_SUFFIX
        if not os.path.exists(index_path):
            return cls.scan(path)
        record = _read_json(index_path)
        try:
            rows = record["samples"]
            keys = [str(row[0]) for row in rows]
            spans = np.array([row[1:] for row in rows], np.int64).reshape(len(rows), 3, 2)
            size = int(record["bytes"])
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(f"{index_path}: not a shard index of this version; delete it to scan the shard") from None
        actual = _file_size(path)
        if actual != size:
            raise UserError(
                f"{path}: found {actual:,} bytes, expected {size:,} by {index_path}: "
                "the shard is incomplete or was replaced"
            )
        return cls(path, keys, spans, size)

    @classmethod
    def scan(cls, path: str) -> ShardIndex:
        """Read every header of the tar. Neighbouring members with one key are one sample.

        Raises:
            UserError: the file is missing, no uncompressed tar, or ends early.
        """
        size = _file_size(path)
        keys: list[str] = []
        spans: list[list[list[int]]] = []
        end = 0
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    # tarfile keeps every header it has seen; a shard may hold a hundred thousand.
                    tar.members = []  # type: ignore[attr-defined]
                    key, column = _split_name(member.name)
                    if not member.isfile() or column is None:
                        continue
                    if not keys or keys[-1] != key or spans[-1][column][0] >= 0:
                        keys.append(key)
                        spans.append([[-1, 0], [-1, 0], [-1, 0]])
                    spans[-1][column] = [member.offset_data, member.size]
        except (tarfile.TarError, EOFError) as error:
            last = f" after sample {keys[-1]}" if keys else ""
            raise UserError(f"{path}: not a readable, uncompressed tar{last}: {error}") from None
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
        last = f" after sample {keys[-1]}" if keys else ""
        with open(path, "rb") as handle:
            handle.seek(end)
            block = handle.read(_BLOCK)
        if len(block) < _BLOCK:
            raise UserError(f"{path}: the tar ends early{last} (no end-of-archive mark): incomplete copy?")
        if any(block):
            raise UserError(f"{path}: the tar is damaged{last}: found no header at byte {end:,}")
        return cls(path, keys, np.array(spans, np.int64).reshape(len(keys), 3, 2), size)

    def write(self) -> None:
        """Write ``PATH.idx.json``."""
        rows = [[key, *span] for key, span in zip(self.keys, self.spans.reshape(len(self), 6).tolist(), strict=True)]
        record = {"version": _VERSION, "bytes": self.size, "samples": rows}
        write_text(self.path + INDEX_SUFFIX, json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n")

    def where(self, row: int) -> str:
        """``"SHARD: sample KEY"``."""
        return f"{self.path}: sample {self.keys[row]}"

    def read(self, row: int, handle: int) -> RawSample:
        """Read one sample.

        Args:
            row: which sample, in the order of the file.
            handle: an open file descriptor of the shard.

        Raises:
            Damage: a member is absent or cut off, or the captions are missing or empty; names shard and sample.
        """
        where = self.where(row)
        spans = self.spans[row]
        if spans[_IMAGE, 0] < 0:
            raise Damage(DamageKind.NO_IMAGE, f"{where}: no image member (expected one of .{', .'.join(IMAGE_SUFFIXES)})")
        source = self._caption_column(row)
        # The members of a sample are neighbours: one read fetches both.
        first = int(min(spans[_IMAGE, 0], spans[source, 0]))
        last = int(max(spans[_IMAGE].sum(), spans[source].sum()))
        data = _read_span(handle, first, last - first, where)
        image, text = (data[spans[column, 0] - first : spans[column].sum() - first] for column in (_IMAGE, source))
        captions, meta = _parse_captions(bytes(text), source, where)
        return RawSample(self.keys[row], where, image, captions, meta)

    def read_captions(self, row: int, handle: int) -> tuple[str, ...]:
        """Read a sample's captions without its image; see `read`."""
        source = self._caption_column(row)
        offset, size = self.spans[row, source].tolist()
        where = self.where(row)
        return _parse_captions(bytes(_read_span(handle, offset, size, where)), source, where)[0]

    def _caption_column(self, row: int) -> int:
        for column in (_META, _TEXT):
            if self.spans[row, column, 0] >= 0:
                return column
        raise Damage(DamageKind.NO_CAPTION, f"{self.where(row)}: no .json and no .txt member with its captions")


def _read_span(handle: int, offset: int, size: int, where: str) -> memoryview:
    """Read bytes of an open file into a writable buffer, or raise a `Damage` when it ends before."""
    data = memoryview(bytearray(size))
    done = 0
    while done < size:
        try:
            count = os.preadv(handle, [data[done:]], offset + done)
        except OSError as error:
            raise Damage(DamageKind.SHARD_UNREADABLE, f"{where}: cannot be read: {error.strerror}") from None
        if count == 0:
            raise Damage(DamageKind.SHARD_TRUNCATED, f"{where}: the shard ends inside this sample")
        done += count
    return data


def _parse_captions(data: bytes, column: int, where: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and JSON object (empty for a ``.txt``) of a sample."""
    if column == _TEXT:
        return text_captions(data, where), {}
    meta = parse_meta(data, where)
    return meta_captions(meta, where), meta


class ShardSet:
    """A data set: its shards, their sample counts, and random access to samples.

    Holds the paths, one array of counts, and the indexes and open files of the ``cache`` shards used last: its memory
    does not grow with the number of samples.

    Attributes:
        paths: S shard files.
        counts: int64 [S], samples of each shard; with a limit, shards after it count 0.
    """

    def __init__(self, spec: str | Sequence[str], limit: int | None = None, cache: int = 2) -> None:
        """Args: ``spec``, see `expand_shards`; ``limit``, use the first N samples; ``cache``, shards kept open."""
        self.paths = expand_shards(spec)
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
            count = known[0] if known is not None else len(ShardIndex.open(path))
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

    def read(self, shard: int, row: int) -> RawSample:
        """Read one sample; see `ShardIndex.read`."""
        index, handle = self._entry(shard)
        return index.read(row, handle)

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
        index = ShardIndex.open(path)
        if len(index) < self.counts[shard]:
            raise UserError(
                f"{path}: found {len(index)} samples, expected {self.counts[shard]} by the "
                f"{MANIFEST_NAME} beside it: the shard was replaced; pack again or delete the {MANIFEST_NAME}"
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


def read_manifest(folder: str) -> dict[str, tuple[int, int]]:
    """Read a folder's ``shards.json``: shard name → (samples, bytes); empty when there is none."""
    path = os.path.join(folder, MANIFEST_NAME)
    if not os.path.exists(path):
        return {}
    record = _read_json(path)
    try:
        return {str(name): (int(samples), int(size)) for name, (samples, size) in record["shards"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a shard manifest of this version; delete it to scan the shards") from None


def write_manifest(folder: str | Path, indexes: dict[str, tuple[int, int]]) -> None:
    """Write a folder's ``shards.json`` from shard name → (samples, bytes)."""
    shards = {name: list(entry) for name, entry in sorted(indexes.items())}
    record = {"version": _VERSION, "samples": sum(entry[0] for entry in indexes.values()), "shards": shards}
    write_text(Path(folder) / MANIFEST_NAME, json.dumps(record) + "\n")


def _split_name(name: str) -> tuple[str, int | None]:
    """Split a member's name as webdataset does: the extension starts at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    key = f"{folder}/{stem}" if folder else stem
    if suffix in IMAGE_SUFFIXES:
        return key, _IMAGE
    return key, {"json": _META, "txt": _TEXT}.get(suffix)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as handle:
            record = json.load(handle)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise UserError(f"{path}: found another format, expected a JSON object with version {_VERSION}")
    return record


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
