"""The folders a run writes to: room, permission, and how fast a file is safe on disk."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mmd2v.data.shard_cache import default_folder
from mmd2v.doctor.finding import Check, Finding, Level, Subject
from mmd2v.errors import disk_message

GIGABYTE = 1e9
_BLOCK = b"mmd2v doctor\n" * 80_000  # 1 MB
_SLOW_WRITE = 2.0  # seconds for 1 MB, written through to the disk
_FEW_FILES = 10_000  # that the file system can still hold


class Room(NamedTuple):
    """Free bytes below which a folder is an error or a warning, and what its absence is."""

    error: float
    warning: float
    unwritable: Level
    hint: str


RUN = Room(1 * GIGABYTE, 20 * GIGABYTE, "error", "free some, or name another folder with --run_dir")
_TEMPORARY = Room(0.1 * GIGABYTE, 2 * GIGABYTE, "error", "free some, or set TMPDIR to another folder")
_SHARED_MEMORY = Room(0.03 * GIGABYTE, 1 * GIGABYTE, "error", "docker: --shm-size=8g; loader processes hand over there")


def cache_folders() -> dict[str, tuple[str, Path]]:
    """What a run keeps between runs: name → (variable that moves it, where it is)."""
    home = Path.home() / ".cache"
    temporary = Path(tempfile.gettempdir())
    places = {
        "cache of Hugging Face": ("HF_HOME", home / "huggingface"),
        "cache of DeepSpeed's operators": ("TORCH_EXTENSIONS_DIR", home / "torch_extensions"),
        "cache of Triton": ("TRITON_CACHE_DIR", Path.home() / ".triton"),
        "cache of torch.compile": ("TORCHINDUCTOR_CACHE_DIR", temporary / f"torchinductor_{os.getuid()}"),
        "cache of shards": ("MMD2V_CACHE", Path(default_folder())),
    }
    return {name: (variable, Path(os.environ.get(variable) or path)) for name, (variable, path) in places.items()}


def folder_checks() -> list[Check]:
    """Return the checks of every folder but the run's."""
    caches = [
        Check(name, partial(folder, path, Room(0, GIGABYTE, "warning", f"set {variable} to another folder")))
        for name, (variable, path) in cache_folders().items()
    ]
    return [
        Check("temporary folder", partial(folder, Path(tempfile.gettempdir()), _TEMPORARY)),
        Check("/dev/shm", partial(folder, Path("/dev/shm"), _SHARED_MEMORY)),
        *caches,
    ]


def folder(path: Path, room: Room, subject: Subject) -> Finding:
    """Check that a folder, or the one it would be made in, can be written and has room."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return Finding(room.unwritable, f"{path} cannot be made: {there} is no folder", room.hint, "no folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(room.unwritable, f"{path} cannot be written: {disk_message(error)}", room.hint, "read-only")
    found = os.statvfs(there)
    return room_finding(path, found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None, room)


def room_finding(path: Path, free: float, files: int | None, room: Room) -> Finding:
    """Judge ``free`` bytes and the number of ``files`` that can still be made; None where that has no limit."""
    level: Level = "error" if free < room.error else "warning" if free < room.warning else "ok"
    what, short = f"{path}: {free / GIGABYTE:.1f} GB free", f"{free / GIGABYTE:.0f} GB"
    if files is not None and files < _FEW_FILES:
        return Finding("error" if level == "error" else "warning", f"{what}, room for {files} files", room.hint, short)
    return Finding(level, what, "" if level == "ok" else room.hint, short)


def run_folder(subject: Subject) -> Finding:
    """Check the run's folder: room, and a file written through to the disk, read again and renamed."""
    if subject.run_dir is None:
        return Finding("ok", "not checked: neither --config nor --run-dir names it")
    found = folder(subject.run_dir, RUN, subject)
    if found.level == "error" or not subject.run_dir.is_dir():
        return found
    try:
        seconds = write_through(subject.run_dir)
    except OSError as error:
        return Finding("error", f"{subject.run_dir} cannot be written: {disk_message(error)}", RUN.hint, "read-only")
    what = f"{found.what}; 1 MB written, read and renamed in {seconds * 1e3:.0f} ms"
    if seconds > _SLOW_WRITE:
        hint = found.hint or "checkpoints will take long: look at the file system's load"
        return Finding("warning", what, hint, found.short)
    return Finding(found.level, what, found.hint, found.short)


def write_through(folder: Path) -> float:
    """Write 1 MB through to the disk, rename it, read it and remove it; return the seconds.

    Raises OSError, also when what is read is not what was written.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".mmd2v-doctor-", dir=folder) as inside:
        written, renamed = Path(inside) / "written", Path(inside) / "renamed"
        with open(written, "wb") as handle:
            handle.write(_BLOCK)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(written, renamed)
        if renamed.read_bytes() != _BLOCK:
            raise OSError("what was written is not what is read")
    return time.perf_counter() - start
