"""A folder of its own for what each rank compiles: on a file system that nodes share, ranks take each other's files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mmd2v.distributed.launchers import Place

_FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def separate_caches(place: Place, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that give this rank caches on its node, without those that are set already.

    The folder is made, readable for its owner alone. Nothing for a process alone.
    """
    wanted = {name: folder for name, folder in _FOLDERS.items() if not environ.get(name)}
    if place.size == 1 or not wanted:
        return {}
    node = environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or tempfile.gettempdir()
    job = environ.get("SLURM_JOB_ID") or "local"
    folder = _private(Path(node), f"mmd2v-{os.getuid()}-{job}-rank{place.rank}")
    return {name: str(folder / inner) for name, inner in wanted.items()}


def _private(parent: Path, name: str) -> Path:
    """A folder that nobody else can write to: what is found in it is run."""
    folder = parent / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.getuid() and not folder.is_symlink() and not found.st_mode & 0o022:
            return folder
    except OSError:  # a file of that name, or a parent that cannot be written
        pass
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))
