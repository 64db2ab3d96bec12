"""The shards that img2dataset writes (CC3M, CC12M, SBU): ``KEY.jpg`` (webp, png), ``KEY.txt``, ``KEY.json`` in tars.

``KEY.json`` holds "caption", "url", "key", "status", "sha256", "original_width" and more; beside ``00000.tar`` lie
``00000_stats.json`` and ``00000.parquet``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmd2v.data.captions import parse_meta
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_files import Stamp, stamp
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.sources.base import Record, Source, SourceOptions
from mmd2v.data.sources.peek import Peek
from mmd2v.data.tar_members import plain_members
from mmd2v.errors import UserError

_STATS_SUFFIX = "_stats.json"
_DROPPED = frozenset(["caption", "captions", "key", "status", "error_message", "width", "height", "exif", "id"])
"""Keys of a JSON that are kept elsewhere, say nothing of a success, or describe another encoding of the image."""


@dataclass
class _Group:
    """The members of one key: suffix → (offset, bytes)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class Img2dataset(Source):
    """Shards in the order of their names, samples in the order of each shard."""

    format = "img2dataset"
    summary = "a folder of img2dataset's .tar shards (CC3M, CC12M, SBU)"
    takes = frozenset()

    def __init__(self, peek: Peek, options: SourceOptions) -> None:
        """Raises UserError: no shards there."""
        self.path = peek.path
        if peek.path.is_dir():
            self._tars = [peek.path / name for name in peek.names if name.endswith(".tar")]
        else:
            self._tars = [peek.path] if peek.suffix == ".tar" else []
        if not self._tars:
            raise UserError(f"{self.path}: format {self.format} needs .tar shards in a folder, found none")
        # Keys start with the number of their shard, which has as many digits everywhere: no other shard has them.
        self._equal_stems = len({len(tar.stem) for tar in self._tars}) == 1
        self.total = self._successes()

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        if peek.path.is_dir():
            if any(name.endswith(_STATS_SUFFIX) for name in peek.names):
                return True
            tars = [name for name in peek.names if name.endswith(".tar")]
            return bool(tars) and Img2dataset.detect(Peek(peek.path / tars[0]))
        return any(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES for name in peek.names)

    def _successes(self) -> int | None:
        """Samples of all shards by their statistics; None when one has none."""
        total = 0
        for tar in self._tars:
            try:
                total += int(json.loads(tar.with_name(tar.stem + _STATS_SUFFIX).read_bytes())["successes"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return total

    def records(self) -> Iterator[Record]:
        """See `Source.records`."""
        for tar in self._tars:
            yield from self._shard(tar)

    def _shard(self, path: Path) -> Iterator[Record]:
        handle = _OpenFile(path)
        seen: set[str] = set()
        group: _Group | None = None
        try:
            for member in plain_members(str(path)):
                key, suffix = _split(member.name)
                if group is None or group.key != key or suffix in group.members:
                    if group is not None:
                        yield self._record(path, handle, group, seen)
                    group = _Group(key)
                group.members[suffix] = (member.offset_data, member.size)
        except Damage as damage:
            # The last group may lack members that were cut off; with image and JSON it lacks nothing of matter.
            if group is not None and "json" in group.members and any(k in group.members for k in IMAGE_SUFFIXES):
                yield self._record(path, handle, group, seen)
            unfinished = (
                "" if path.with_name(path.stem + _STATS_SUFFIX).exists() else " (img2dataset did not finish it)"
            )
            damage = Damage(damage.kind, f"{damage}{unfinished}")
            yield Record(path.stem, None, [], damage=damage)
            return
        if group is not None:
            yield self._record(path, handle, group, seen)

    def _record(self, path: Path, handle: _OpenFile, group: _Group, seen: set[str]) -> Record:
        """A record of one key. Its id is unique over the shards without a look at the others."""
        own = group.key.startswith(path.stem) and "/" not in group.key and self._equal_stems
        record = Record(group.key if own else f"{path.stem}/{group.key}", None, [])
        where = f"{path}: sample {group.key}"
        image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in group.members), None)
        try:
            if group.key in seen:
                raise Damage(DamageKind.DUPLICATE_KEY, f"{where}: an earlier sample of the shard has the same key")
            seen.add(group.key)
            if image is None:
                expected = ", .".join(IMAGE_SUFFIXES)
                raise Damage(DamageKind.NO_IMAGE, f"{where}: no image member, expected one of .{expected}")
            record.image = f"{group.key}.{image}"
            record.read = partial(handle.read, *group.members[image], where)
            record.captions, record.extras = _caption(group, handle, where)
        except Damage as damage:
            record.damage = damage
        return record

    def stamps(self) -> Iterator[Stamp]:
        """See `Source.stamps`."""
        yield from map(stamp, self._tars)


class _OpenFile:
    """A file opened when first read and closed with the last record that refers to it."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # told by whoever reads its members
            return

    def read(self, offset: int, size: int, where: str) -> bytes:
        """Bytes of the file; raises a `Damage` that starts with ``where``."""
        try:
            data = os.pread(self._handle, size, offset) if self._handle is not None else b""
        except OSError as error:
            raise Damage(DamageKind.SHARD_UNREADABLE, f"{where}: cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise Damage(DamageKind.SHARD_TRUNCATED, f"{where}: the shard ends inside this sample")
        return data

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


def _caption(group: _Group, handle: _OpenFile, where: str) -> tuple[list[str], dict[str, Any]]:
    """The caption, of the JSON or else the text, and what else the JSON tells. Raises `Damage`."""
    meta: dict[str, Any] = {}
    if "json" in group.members:
        meta = parse_meta(handle.read(*group.members["json"], where), where)
        status = meta.get("status", "success")
        if status != "success":
            raise Damage(DamageKind.NO_IMAGE, f"{where}: its download failed: status {status!r}")
    caption = meta.get("caption")
    if caption is None and "txt" in group.members:
        try:
            caption = handle.read(*group.members["txt"], where).decode()
        except UnicodeDecodeError as error:
            raise Damage(DamageKind.BAD_ENCODING, f"{where}: its caption is not UTF-8: {error}") from None
    if caption is None:
        raise Damage(DamageKind.NO_CAPTION, f"{where}: no caption in its .json and no .txt")
    extras = {key: value for key, value in meta.items() if key not in _DROPPED and value is not None}
    return caption if isinstance(caption, list) else [caption], extras


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: img2dataset's keys have no dot."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()
