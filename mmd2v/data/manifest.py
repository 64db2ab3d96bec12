"""``shards.json``, which `mmd2v data pack` writes beside the shards: samples, bytes and checksum of each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmd2v.errors import UserError
from mmd2v.files import write_text

__all__ = [
    "MANIFEST_NAME",
    "MOST_SAMPLES",
    "ManifestEntry",
    "is_natural",
    "parse_manifest",
    "read_manifest",
    "write_manifest",
]

MANIFEST_NAME = "shards.json"
MOST_SAMPLES = 2**40  # of one shard; sums over all shards stay far from the end of an int64
_VERSION = 1
_MOST_BYTES = 2**60  # of one shard


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
    try:
        with open(path, "rb") as handle:
            data = handle.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: str) -> dict[str, ManifestEntry]:
    """As `read_manifest`, of what the file at ``path`` holds."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise UserError(f"{path}: found another format, expected a JSON object with version {_VERSION}")
    shards = record.get("shards")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: not a shard manifest of this version; delete it to scan the shards")
    for name, entry in shards.items():
        if name in ("", ".") or "/" in name or "\\" in name or ".." in name:  # the first two name the folder itself
            raise UserError(f"{path}: found the shard name {name!r}, expected the name of a file beside it")
        if not _is_manifest_entry(entry):
            raise UserError(
                f"{path}: shard {name!r}: found {json.dumps(entry)[:200]}, expected [samples, bytes, SHA-256], the "
                "first two natural numbers; not a shard manifest of this version; delete it to scan the shards"
            )
    return {name: ManifestEntry(*entry) for name, entry in shards.items()}


def _is_manifest_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or not 2 <= len(entry) <= 3:
        return False
    samples, size, *rest = entry
    return (
        is_natural(samples, MOST_SAMPLES) and is_natural(size, _MOST_BYTES) and isinstance((*rest, "")[0], str | None)
    )


def write_manifest(folder: str | Path, shards: Mapping[str, ManifestEntry]) -> None:
    """Write a folder's ``shards.json`` from shard name → what it tells: ``[samples, bytes, sha256]`` each."""
    entries = {name: list(entry) for name, entry in sorted(shards.items())}
    record = {"version": _VERSION, "samples": sum(entry.samples for entry in shards.values()), "shards": entries}
    write_text(Path(folder) / MANIFEST_NAME, json.dumps(record) + "\n")


def is_natural(value: Any, most: int) -> bool:
    """Whether a value of a JSON file is a whole number from 0 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
