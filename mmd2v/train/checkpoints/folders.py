"""The folders of a run's checkpoints: finding one, and what their names mean."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mmd2v.errors import UserError, nearest
from mmd2v.train.checkpoints.manifest import MANIFEST

AUTO = "auto"
TEMPORARY = re.compile(r"\.step-\d{6,}(\.old|\.universal)?\.tmp")
_FOLDER = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.(step-\d{6,})\.old\.tmp")
_ABANDONED = "abandoned-"
_DAMAGED = "damaged-"


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the finished checkpoints under ``folder``, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        step = step_of(path)
        if step is not None and (path / MANIFEST).is_file():
            found.append((step, path))
    return sorted(found)


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint's folder is named after, None for another name.

    Steps, and no times of files, tell which checkpoint is newer: clocks jump, and copies have other times.
    """
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def find_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """Return the checkpoint a run would start from, None for a new run; `choosing` sees whether it is whole.

    ``resume`` is None, ``"auto"`` (newest of ``run_dir``, if any) or a path: a checkpoint, a folder of checkpoints or
    a run directory. Raises UserError for a path without checkpoint, and when ``run_dir`` has checkpoints that nobody
    asked to continue.
    """
    own = complete_checkpoints(run_dir / "checkpoints")
    if resume is None:
        if own:
            raise UserError(
                f"run_dir: '{run_dir}' already holds a run with a checkpoint at step {own[-1][0]}; continue it with "
                f"--resume {AUTO}, or name another folder with --run_dir"
            )
        return None
    if resume == AUTO:
        return own[-1][1] if own else None
    path = Path(resume)
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--resume: folder '{path}' does not exist.{nearest(path.name, siblings)}")
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := complete_checkpoints(folder):
            return found[-1][1]
    raise UserError(f"--resume: '{path}' is no checkpoint and holds none (expected {MANIFEST} in it or in step-…)")


def restore_replaced(run_dir: Path) -> None:
    """Bring back checkpoints whose successor of the same step was never put in place; remove what is left of others."""
    folder = run_dir / "checkpoints"
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if match := _REPLACED.fullmatch(path.name):
            final = folder / match[1]
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.replace(path, final)


def set_aside_after(run_dir: Path, step: int) -> str | None:
    """Rename the checkpoints after ``step``: a run that goes back to it leaves their branch for a new one.

    Left in place they would count as the newest. Returns a line that says so, None when there are none.
    """
    aside = []
    for found, path in complete_checkpoints(run_dir / "checkpoints"):
        if found > step:
            aside.append(_renamed(path, _ABANDONED).name)
    if not aside:
        return None
    return f"going back to step {step}; later checkpoints are set aside as {', '.join(aside)} (remove them at will)"


def set_aside_damaged(path: Path) -> Path:
    """Rename a checkpoint that cannot be read, so that it no longer counts, and return its new path."""
    return _renamed(path, _DAMAGED)


def _renamed(path: Path, prefix: str) -> Path:
    target = path.with_name(prefix + path.name)
    shutil.rmtree(target, ignore_errors=True)  # of an earlier time
    os.replace(path, target)
    return target
