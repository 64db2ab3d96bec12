"""Writes samples into a folder of WebDataset shards with their indexes and manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from webdataset import TarWriter

from mmd2v.data.manifest import ManifestEntry, write_manifest
from mmd2v.data.shards import ShardIndex

_WRITE_BYTES = 1 << 20  # written at once


def sample_key(sample_id: str) -> str:
    """Turn an id into a key that WebDataset leaves whole: different ids have different keys.

    WebDataset takes everything behind the first dot for the extension; dots and unusual characters are percent-encoded.
    """
    return quote(sample_id, safe="/" if not sample_id.startswith("/") else "").replace(".", "%2E")


def shard_name(number: int) -> str:
    """``shard-000000.tar`` and so on."""
    return f"shard-{number:06d}.tar"


class _HashedFile:
    """A file being written whose SHA-256 is known when it is done, without reading it again.

    A thread hashes and writes a megabyte while the next one is put together: both leave other threads their turn.
    """

    def __init__(self, path: Path) -> None:
        self._handle = open(path, "wb", buffering=0)  # noqa: SIM115 - open across calls; closed with the shard
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard writer")
        self._busy: Future[None] | None = None

    def write(self, data: bytes) -> int:
        """Append; an error of the disk may come with a later call."""
        self._buffer += data
        if len(self._buffer) >= _WRITE_BYTES:
            self._pass_on()
        return len(data)

    def _pass_on(self) -> None:
        if self._busy is not None:
            self._busy.result()
        self._busy = self._thread.submit(self._store, self._buffer)
        self._buffer = bytearray()

    def _store(self, data: bytearray) -> None:
        self._hash.update(data)
        left = memoryview(data)
        while left:
            left = left[self._handle.write(left) :]

    def sync(self) -> None:
        """Write all of it through to the disk."""
        self._pass_on()
        assert self._busy is not None
        self._busy.result()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file and end the thread."""
        self._thread.shutdown()
        self._handle.close()

    @property
    def sha256(self) -> str:
        """In hexadecimal, of what `sync` has written."""
        return self._hash.hexdigest()


class ShardFolder:
    """A folder being filled with ``shard-000000.tar``, …: ``samples`` samples each. Use as a context manager.

    The bytes written depend on the samples alone (no time stamps). Write into a temporary folder and rename it: an
    interrupted writer leaves a shard without index.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: int,
        *,
        written: Mapping[str, ManifestEntry] | None = None,
        finished: Callable[[str, ManifestEntry], None] | None = None,
    ) -> None:
        """Start, or go on, filling.

        Args:
            folder: it must exist.
            samples: samples a shard.
            written: shards of an earlier attempt that are finished there, the first ones without a gap.
            finished: called with the name and entry of each shard once it and its index are on the disk.
        """
        self.folder = Path(folder)
        self.samples = samples
        self.written: dict[str, ManifestEntry] = dict(written or {})
        self._finished = finished
        self._tar: TarWriter | None = None
        self._handle: _HashedFile | None = None
        self._in_shard = 0

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self._finish_shard()
            write_manifest(self.folder, self.written)
        elif self._tar is not None and self._handle is not None:
            # The shard is about to be removed; only the tar's own buffers must not outlive the file.
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._handle.close()

    def write(self, sample_id: str, jpeg: bytes | None, meta: dict[str, Any]) -> None:
        """Append one sample, without ``jpeg`` a text; ``meta`` becomes its JSON, with ``id`` in front."""
        if self._tar is None:
            self._start_shard()
        assert self._tar is not None
        members = {"__key__": sample_key(sample_id), "json": _json({"id": sample_id, **meta})}
        if jpeg is not None:
            members["jpg"] = jpeg
        self._tar.write(members)
        self._in_shard += 1
        if self._in_shard == self.samples:
            self._finish_shard()

    def _start_shard(self) -> None:
        self._path = self.folder / shard_name(len(self.written))
        self._handle = _HashedFile(self._path)
        self._tar = TarWriter(self._handle, encoder=False, mtime=0, user="mmd2v", group="mmd2v", format="PAX_FORMAT")
        self._in_shard = 0

    def _finish_shard(self) -> None:
        if self._tar is None or self._handle is None:
            return
        self._tar.close()
        self._handle.sync()
        self._handle.close()
        self._tar = None
        index = ShardIndex.scan(str(self._path))
        index.write()
        entry = ManifestEntry(len(index), index.size, self._handle.sha256)
        self.written[self._path.name] = entry
        if self._finished is not None:
            self._finished(self._path.name, entry)


def _json(value: dict[str, Any]) -> bytes:
    """JSON in UTF-8; with escapes where a string holds half a character, which UTF-8 cannot."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()
