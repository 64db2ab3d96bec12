"""Continuing a run with another number of ranks."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from mmd2v.distributed.collectives import barrier, rank
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.errors import UserError, disk_message
from mmd2v.train.checkpoints import universal
from mmd2v.train.checkpoints.manifest import Manifest
from mmd2v.train.engine import Engine

_INTERCHANGEABLE = {1, 2}
"""ZeRO stages whose universal checkpoints are the same."""


def stages_fit(found: int, expected: int) -> bool:
    """Whether a checkpoint of ZeRO stage ``found`` can be continued at stage ``expected``."""
    return found == expected or {found, expected} <= _INTERCHANGEABLE


def needs_conversion(found: Manifest, expected: Manifest) -> bool:
    """Whether DeepSpeed's files are cut into other pieces than this run has.

    Without ZeRO every rank has everything, and rank 0's file serves any number of them.
    """
    same = (found.world_size, found.zero_stage) == (expected.world_size, expected.zero_stage)
    return found.zero_stage > 0 and not same


def load_resharded(engine: Engine, path: Path, name: str) -> float:
    """Load a checkpoint by way of its universal form; every rank must call it. Returns the seconds of conversion.

    The universal form is made under the present run's checkpoints, which all ranks see, and removed afterwards; what
    a killed conversion leaves there has a name that starts with a dot, and the next one or the next checkpoint
    removes it. ``name`` is the checkpoint's own.

    Raises UserError when the disk refuses it, and what DeepSpeed raises for damaged files.
    """
    temporary = Path(engine.config.run_dir).absolute() / "checkpoints" / f".{name}.universal.tmp"
    # DeepSpeed notes the newest universal checkpoint in the folder above it, which is to be removed too.
    target = temporary / name
    try:
        seconds: float = from_main_rank(lambda: _convert(engine, path, target))
        universal.load(engine, target)
        barrier()
    finally:
        # After an error there is nothing to wait for: the other ranks may never come.
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return seconds


def _convert(engine: Engine, path: Path, target: Path) -> float:
    start = time.perf_counter()
    try:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.mkdir(parents=True)
        universal.convert(path, target, engine.module)
    except (OSError, RuntimeError) as error:
        if message := _write_error(error, target.parent):
            raise UserError(f"{target}: cannot write the universal form of {path}: {message}") from error
        raise
    return time.perf_counter() - start


def _write_error(error: OSError | RuntimeError, folder: Path) -> str | None:
    """Say what the disk refused; None for an error in reading the checkpoint."""
    if isinstance(error, RuntimeError):  # torch's writer has none of its own
        return "the disk is full or a quota is reached" if "PytorchStreamWriter" in str(error) else None
    if error.errno is None:  # DeepSpeed's own
        return None
    return disk_message(error) if error.filename is None or str(folder) in str(error.filename) else None
