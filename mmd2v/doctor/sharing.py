"""Whether all nodes see the same run folder, and how soon what one writes appears on the others."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmd2v.doctor.finding import Finding, TooSlow, within

_PATIENCE = 15.0  # seconds; network file systems show what is new only after a while
_LATE = 5.0
_LOOK_EVERY = 0.01


@contextmanager
def marker(run_dir: Path | None) -> Iterator[list[str] | None]:
    """Yield [name, content] of a file that rank 0 puts into the run folder, None when it cannot.

    What was made for it goes away at the end, the run folder itself included.
    """
    made: list[Path] = []
    inside: list[Path] = []
    placed: list[str] | None = None
    try:
        if run_dir is not None:
            with suppress(OSError, TooSlow):
                placed = within(_PATIENCE, lambda: _place(run_dir, made, inside))
        yield placed
    finally:
        for folder in inside:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in reversed(made):
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()


def look_for(run_dir: Path | None, wanted: list[str] | None, first: str, patience: float = _PATIENCE) -> Finding:
    """Look for rank 0's file, which node ``first`` wrote, until ``patience`` seconds are over."""
    if run_dir is None:
        return Finding("ok", "not checked: neither --config nor --run-dir names it")
    if wanted is None:
        return Finding("error", f"not checked: {first} cannot write to {run_dir}", short="not checked")
    name, content = wanted
    start = time.monotonic()
    found: str | None = None
    while found != content:
        waited = time.monotonic() - start
        if waited > patience:
            hint = "put run_dir on a file system that every node mounts at the same place"
            why = "is not there" if not run_dir.is_dir() else "does not hold what rank 0 wrote"
            return Finding("error", f"{run_dir} {why} ({first}): not shared", hint, "not shared")
        with suppress(OSError):
            os.listdir(run_dir)  # makes NFS look again
            found = (run_dir / name).read_text(encoding="utf-8")
        if found != content:
            time.sleep(_LOOK_EVERY)
    waited = time.monotonic() - start
    what, short = f"what {first} writes is seen after {waited * 1e3:.0f} ms", f"{waited * 1e3:.0f} ms"
    if waited > _LATE:
        return Finding("warning", what, "mount it with a shorter cache of attributes (NFS: actimeo=1)", short)
    return Finding("ok", what, short=short)


def _place(run_dir: Path, made: list[Path], inside: list[Path]) -> list[str]:
    """Write the file; note the folders that are made, so that they go even when this fails half-way."""
    _make(run_dir.absolute(), made)
    folder = Path(tempfile.mkdtemp(prefix=".mmd2v-doctor-", dir=run_dir))
    inside.append(folder)
    folder.chmod(0o755)  # other nodes' root may be nobody here
    name, content = f"{folder.name}/marker", secrets.token_hex(16)
    _write(run_dir / name, content)
    return [name, content]


def _make(folder: Path, made: list[Path]) -> None:
    if not folder.exists():
        _make(folder.parent, made)
        folder.mkdir()
        made.append(folder)


def _write(path: Path, content: str) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)  # nobody sees half of it
