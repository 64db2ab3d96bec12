"""Which shards a specification names: local files and folders, and addresses of any file system.

An address is ``PROTOCOL://…`` of a file system that fsspec knows, or ``pipe:COMMAND``, whose output is the shard.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

import braceexpand

from mmd2v.errors import UserError, nearest

PIPE = "pipe:"


def is_remote(address: str) -> bool:
    """Whether an item of a specification is an address and no local path."""
    return "://" in address or address.startswith(PIPE)


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
