"""SHA-256 of a checkpoint's files: what the manifest says of them, and whether they still are what was written."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmd2v.train.checkpoints.manifest import Manifest

Checksum = tuple[int, str]
"""Size in bytes, SHA-256 in hexadecimal digits."""

_THREADS = 8  # a disk array or a parallel file system serves several readers at once


def verify(folder: Path, manifest: Manifest, *, hashes: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint's files, a phrase each; an empty list when nothing is.

    Without ``hashes`` only whether files are there and as long as they were. Of a checkpoint written by a version that
    recorded no files, only whether DeepSpeed's are there and not empty.
    """
    if manifest.files is None:
        return _unrecorded(folder, manifest)
    if not isinstance(manifest.files, dict) or not manifest.files:
        return ["the manifest lists no files"]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda item: _problem(folder, *item, hashes=hashes), sorted(manifest.files.items()))
        return [problem for problem in found if problem is not None]


def _problem(folder: Path, name: str, expected: object, *, hashes: bool) -> str | None:
    match expected:
        case [int(size), str(digest)] if Path(name).name == name:
            pass
        case _:
            return f"the manifest's entry on '{name}' is not a name of a file with its size and hash"
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        if hashes:
            with open(path, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    return f"{name} is not what was written (another SHA-256)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return None


def _unrecorded(folder: Path, manifest: Manifest) -> list[str]:
    problems = [f"{path.name} is empty" for path in sorted(folder.glob("*.pt")) if path.stat().st_size == 0]
    if not any(folder.glob("*_model_states.pt")):
        problems.append("DeepSpeed's model states are missing")
    optimizers = len(list(folder.glob("*_optim_states.pt")))
    if manifest.zero_stage > 0 and optimizers != manifest.world_size:
        problems.append(f"it has {optimizers} files of optimiser states instead of {manifest.world_size}")
    return problems
