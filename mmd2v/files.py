"""Output files that appear whole or not at all: everything is written under a temporary name and renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmd2v.errors import UserError

logger = logging.getLogger(__name__)

_SUFFIX = ".tmp"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    The caller may create a file or a folder there. A folder replaces an existing one only when the old one is
    empty (the rule of ``os.replace``), so nothing finished is ever overwritten by half. What a killed process left
    of an earlier attempt at the same path is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    prefix = f"{_prefix(path)}{os.getpid()}."
    parent = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=path.parent))
    temporary = parent / path.name
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if file.is_file():
                _readable(file)
        if temporary.is_file():
            with naming(path), open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError of writing to an open file the name of that file: the system's own has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def check_output(flag: str, path: str | Path, *, new: bool = False) -> None:
    """Raise a UserError that starts with ``flag`` if no file can be written at ``path``; creates nothing.

    Call it before long work whose result goes there. With ``new``, a file that exists is refused too.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder, expected the name of a file")
    if new and path.exists():
        raise UserError(f"{flag}: {path} exists; name a new file or remove it")
    folder = path.absolute().parent
    while not folder.exists():  # the folders that are missing will be made
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{flag}: {path} cannot be written: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written: {folder}: {error.strerror or error}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    with atomic_path(path) as temporary, naming(path):
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically.

    Raises UserError, naming the key, for NaN and infinity: JSON has no such numbers, other programs would refuse the
    whole file, and a null would hide that something went wrong.
    """
    for key, number in _non_finite(value):
        raise UserError(f"{path}: {key or 'its value'} is {number}, which JSON cannot hold; expected a finite number")
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _non_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield (path of keys, number) of every NaN and infinity inside."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield key, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, item in items:
        yield from _non_finite(item, f"{key}.{name}" if key else str(name))


def _prefix(path: Path) -> str:
    """Start of the temporary names for ``path`` that processes of this host use; the process id follows.

    Process ids mean something only within one host and, in containers, one process namespace.
    """
    host = platform.node()
    with suppress(OSError):
        host += os.readlink("/proc/self/ns/pid")
    return f".{path.name}.{hashlib.sha256(host.encode()).hexdigest()[:8]}-"


def _remove_stale(path: Path) -> None:
    """Remove temporary folders for ``path`` of processes of this host that are gone."""
    prefix = _prefix(path)
    for name in os.listdir(path.parent):
        if not (name.startswith(prefix) and name.endswith(_SUFFIX)):
            continue
        process = name.removeprefix(prefix).partition(".")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            logger.warning("%s: removing what a killed process left behind", path.parent / name)
            shutil.rmtree(path.parent / name, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only; no signal is sent
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _readable(file: Path) -> None:
    """Give a file the mode any new file has: some libraries write for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
