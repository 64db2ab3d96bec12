"""Writing a run's checkpoints and keeping the newest of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mmd2v.distributed.collectives import barrier, gather_objects
from mmd2v.distributed.coordination import from_main_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.files import write_json
from mmd2v.train.checkpoints.folders import TEMPORARY, complete_checkpoints
from mmd2v.train.checkpoints.manifest import MANIFEST, Manifest
from mmd2v.train.checkpoints.storage import guarded, storage
from mmd2v.train.engine import Engine, quiet
from mmd2v.train.rank_state import save_rank_state


class Checkpointer:
    """Writes the checkpoints of one run and keeps the newest ``keep`` of them."""

    def __init__(self, run_dir: Path, keep: int, world: World) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.world = world

    @property
    def newest(self) -> Path | None:
        """The newest finished checkpoint."""
        found = complete_checkpoints(self.folder)
        return found[-1][1] if found else None

    def save(self, engine: Engine, manifest: Manifest, extra: Callable[[Path], None] | None = None) -> Path:
        """Write a checkpoint; every rank must call it. ``extra`` adds files to its folder, on rank 0.

        Raises UserError naming the ranks that could not write; nothing of it is left then, and older checkpoints
        are as they were.
        """
        final = self.folder / f"step-{manifest.step:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        from_main_rank(lambda: self._prepare(temporary))
        error = _write(engine, temporary)
        if error is None:
            error = guarded(lambda: save_rank_state(engine.module.objectives, temporary))
        if error is None and self.world.is_main and extra is not None:
            error = guarded(lambda: extra(temporary))
        if error is None and self.world.is_main:
            error = guarded(lambda: write_json(temporary / MANIFEST, asdict(manifest)))
        errors = gather_objects(error)
        if any(errors):
            self._discard(temporary)
            lines = [f"rank {rank}: {message}" for rank, message in enumerate(errors) if message]
            raise shared_error(
                f"{final}: the checkpoint could not be written ({'; '.join(lines)}); nothing of it was kept, "
                + (f"the newest checkpoint is still {self.newest}" if self.newest else "there is none before it")
            )
        from_main_rank(lambda: self._finish(temporary, final))
        return final

    def _prepare(self, temporary: Path) -> None:
        message = guarded(lambda: temporary.mkdir(parents=True, exist_ok=True))
        if message:
            raise UserError(f"{self.folder}: {message}")
        for path in self.folder.iterdir():  # what a killed run left
            if TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _discard(self, temporary: Path) -> None:
        barrier()
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()

    def _finish(self, temporary: Path, final: Path) -> None:
        if final.exists():
            replaced = temporary.with_name(f".{final.name}.old.tmp")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
            os.replace(temporary, final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(temporary, final)
        _sync_folder(self.folder)
        older = [path for _, path in complete_checkpoints(self.folder) if path != final]
        for path in older[: max(0, len(older) - (self.keep - 1))]:
            # Out of sight first: a kill in the middle of the removal must not leave half a checkpoint behind.
            hidden = path.with_name(f".{path.name}.tmp")
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _write(engine: Engine, temporary: Path) -> str | None:
    """Let DeepSpeed write its files; return what went wrong on this rank."""
    own = storage()
    engine.deepspeed.checkpoint_engine = own
    # DeepSpeed drops scripts beside the checkpoints, outside of what can be undone; `mmd2v export` does their work.
    engine.deepspeed._copy_recovery_script = lambda save_path: None
    with quiet():
        engine.deepspeed.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False)
    return own.error


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
