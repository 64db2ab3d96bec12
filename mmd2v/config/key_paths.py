"""Paths of keys in a config, and who set what stands there: a file, a flag, a setting."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["KeyPath", "origin_of", "render", "set_origin"]

KeyPath = tuple[str | int, ...]


def render(path: KeyPath) -> str:
    """Return the path as people write it: ``optimizer.lr``."""
    return ".".join(str(p) for p in path) or "the config"


def set_origin(origin: dict[KeyPath, str], at: KeyPath, source: str) -> None:
    """Note that ``source`` set ``at`` and all below it."""
    for path in [p for p in origin if p[: len(at)] == at]:
        del origin[path]
    origin[at] = source


def origin_of(origin: Mapping[KeyPath, str], path: KeyPath, default: str) -> str:
    """Return who set ``path`` or what it lies in; ``default`` where nobody did."""
    for length in range(len(path), 0, -1):
        if path[:length] in origin:
            return origin[path[:length]]
    return default
