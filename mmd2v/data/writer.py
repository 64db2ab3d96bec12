"""Writes samples into a folder of WebDataset shards with their indexes and manifest."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from webdataset import TarWriter

from mmd2v.data.shards import ShardIndex, write_manifest


def sample_key(sample_id: str) -> str:
    """Turn an id into a key that WebDataset leaves whole: different ids have different keys.

    WebDataset takes everything behind the first dot for the extension; dots and unusual characters are percent-encoded.
    """
    return quote(sample_id, safe="/" if not sample_id.startswith("/") else "").replace(".", "%2E")


class ShardFolder:
    """A folder being filled with ``shard-000000.tar``, …: ``samples`` samples each. Use as a context manager.

    The bytes written depend on the samples alone (no time stamps). Write into a temporary folder and rename it: an
    interrupted writer leaves a shard without index.
    """

    def __init__(self, folder: str | Path, samples: int) -> None:
        """``folder`` must exist."""
        self.folder = Path(folder)
        self.samples = samples
        self.written: dict[str, tuple[int, int]] = {}
        self._tar: TarWriter | None = None
        self._handle: Any = None
        self._in_shard = 0

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self._finish_shard()
            write_manifest(self.folder, self.written)
        elif self._tar is not None:
            # The folder is about to be removed; only the tar's own buffers must not outlive the file.
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._handle.close()

    def write(self, sample_id: str, jpeg: bytes, meta: dict[str, Any]) -> None:
        """Append one sample; ``meta`` becomes its JSON, with ``id`` in front."""
        if self._tar is None:
            self._start_shard()
        assert self._tar is not None
        text = json.dumps({"id": sample_id, **meta}, ensure_ascii=False, separators=(",", ":"))
        self._tar.write({"__key__": sample_key(sample_id), "jpg": jpeg, "json": text.encode()})
        self._in_shard += 1
        if self._in_shard == self.samples:
            self._finish_shard()

    def _start_shard(self) -> None:
        self._path = self.folder / f"shard-{len(self.written):06d}.tar"
        self._handle = open(self._path, "wb")  # noqa: SIM115 - open across calls; closed with the shard
        self._tar = TarWriter(self._handle, encoder=False, mtime=0, user="mmd2v", group="mmd2v", format="PAX_FORMAT")
        self._in_shard = 0

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        self._tar = None
        index = ShardIndex.scan(str(self._path))
        index.write()
        self.written[self._path.name] = (len(index), index.size)
