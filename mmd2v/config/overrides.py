"""Overrides of config fields on a command line: ``--engine.batch_size 64``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmd2v.config.key_paths import KeyPath, render, set_origin
from mmd2v.config.problems import shown
from mmd2v.errors import UserError

__all__ = ["assign", "pairs_of", "split_overrides"]


def split_overrides(argv: Sequence[str], own_flags: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Part a command line into (arguments of the command itself, overrides of config fields).

    ``own_flags`` maps the command's own flags to whether a value follows; any other ``--key`` is an override.
    """
    own: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(argv):
        flag, equals, _ = argv[i].partition("=")
        is_own = flag.replace("_", "-") in own_flags
        slip = [] if is_own else difflib.get_close_matches(flag, own_flags, n=1, cutoff=0.8)
        if slip and "." not in flag:  # no field of the config resembles one of these flags
            raise UserError(f"{flag}: no such flag. Did you mean '{slip[0]}'?")
        takes_value = own_flags.get(flag.replace("_", "-"), True) and not equals
        target = own if is_own or not flag.startswith("--") else overrides
        target.append(argv[i])
        if flag.startswith("--") and takes_value and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            i += 1
            target.append(argv[i])
        i += 1
    return own, overrides


def pairs_of(overrides: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield (``--a.b``, raw value) of ``--a.b value`` and ``--a.b=value``."""
    i = 0
    while i < len(overrides):
        flag, equals, value = overrides[i].partition("=")
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"'{overrides[i]}': expected an override such as --engine.batch_size 64")
        if not equals:
            i += 1
            if i == len(overrides) or overrides[i].startswith("--"):
                raise UserError(f"{flag}: a value is missing; write {flag} VALUE or {flag}=VALUE")
            value = overrides[i]
        yield flag, value
        i += 1


def assign(data: dict[str, Any], flag: str, value: Any, origin: dict[KeyPath, str], source: str) -> KeyPath:
    """Set the dotted key ``flag`` of ``data``, as ``source`` (a file's key, or the flag itself) says; return its path.

    Raises UserError for a key that leads into a value or past a list.
    """
    where = flag if source == flag else f"{source}: {flag}"
    keys = flag.removeprefix("--").split(".")
    container: Any = data
    path: KeyPath = ()
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(container, list):
            if not key.isdecimal() or int(key) >= len(container):
                have = f"0 to {len(container) - 1}" if container else "none, it is empty"
                raise UserError(f"{where}: '{key}' is no item of the list '{render(path)}'; it has {have}")
            index: str | int = int(key)
        elif isinstance(container, dict):
            index = key
        else:
            raise UserError(f"{where}: '{render(path)}' is the value {shown(container)}, it has no key '{key}'")
        path = (*path, index)
        if last:
            container[index] = value
            set_origin(origin, path, source)
            return path
        if isinstance(container, dict) and container.get(index) is None:
            container[index] = {}
            set_origin(origin, path, source)
        container = container[index]
    raise AssertionError("a flag has at least one key")
