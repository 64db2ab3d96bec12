"""Writing a run's checkpoints beside its training, and keeping the newest and the permanent ones."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread

from mmd2v.config.training import CheckpointConfig
from mmd2v.distributed.collectives import barrier, gather_objects
from mmd2v.distributed.coordination import from_main_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError, disk_message
from mmd2v.files import write_json
from mmd2v.train.checkpoints.checksums import Checksum
from mmd2v.train.checkpoints.folders import TEMPORARY, complete_checkpoints, restore_replaced
from mmd2v.train.checkpoints.host_copy import HostBuffers
from mmd2v.train.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from mmd2v.train.checkpoints.storage import storage
from mmd2v.train.checkpoints.writer import CheckpointWriter
from mmd2v.train.engine import Engine, quiet
from mmd2v.train.rank_state import save_rank_state

logger = logging.getLogger(__name__)

_PATIENCE_S = 20.0  # a disk that does not answer must not keep a run from going on, or from ending


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    manifest: Manifest
    writer: CheckpointWriter
    temporary: Path
    final: Path
    best: bool


class Checkpointer:
    """Writes the checkpoints of one run, keeps the newest ``settings.keep`` of them, the best and all permanent ones.

    `save` copies the state and returns; the files are written beside the training, and `finish` puts the checkpoint in
    place. Until then nothing of it is seen, so a run that is killed continues from the one before. Every rank must
    call `save` and `finish`, at the same steps.

    Attributes:
        best: step of the best checkpoint, which is kept until a better one is in place; None: there is none.
    """

    best: int | None = None

    def __init__(self, run_dir: Path, settings: CheckpointConfig, world: World) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / "checkpoints"
        self.settings = settings
        self.world = world
        self._buffers = HostBuffers() if settings.asynchronous else None
        self._pending: _Pending | None = None
        self._removal: Thread | None = None
        self._must_exist = run_dir.is_dir()

    @property
    def newest(self) -> Path | None:
        """The newest finished checkpoint."""
        found = complete_checkpoints(self.folder)
        return found[-1][1] if found else None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing; other ranks may be when it is not."""
        return self._pending is not None and self._pending.writer.busy

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun that `finish` has not put in place; the same on every rank."""
        return self._pending is not None

    def save(
        self,
        engine: Engine,
        manifest: Manifest,
        extra: Callable[[CheckpointWriter], None] | None = None,
        *,
        permanent: bool = False,
        best: bool = False,
    ) -> Path:
        """Begin a checkpoint of the state as it is now and return the path it will have; finish the one before first.

        ``extra`` adds files, on rank 0; ``best`` makes it the best one, once it is in place. Raises UserError when the
        folder cannot be written, and what `finish` raises of the one before. With ``settings.asynchronous`` false the
        checkpoint is in place when this returns.
        """
        self.finish()
        every = self.settings.permanent_every
        permanent = permanent or (every is not None and manifest.step % every == 0)
        final = self.folder / f"step-{manifest.step:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        from_main_rank(lambda: self._prepare(temporary, final))
        self._must_exist = True

        writer = CheckpointWriter(temporary, self._buffers)
        self._pending = _Pending(replace(manifest, permanent=permanent), writer, temporary, final, best)
        _write(engine, writer)
        with writer.noting_errors():
            save_rank_state(engine.module.objectives, writer)
        if self.world.is_main and extra is not None:
            with writer.noting_errors():
                extra(writer)
        writer.start()
        if not self.settings.asynchronous:
            self.finish()
        return final

    def finish(self) -> None:
        """Wait until every rank has written its part, then put the checkpoint in place; nothing when none is pending.

        Raises UserError on every rank, naming those that could not write; nothing of it is left then, and older
        checkpoints are as they were.
        """
        if self._pending is None:
            return
        pending, writer = self._pending, self._pending.writer
        writer.wait()
        outcomes: list[tuple[str | None, dict[str, Checksum]]] = gather_objects((writer.error, writer.files))
        self._pending = None
        lines = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error is not None]
        if lines:
            if self.world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            barrier()
            raise shared_error(self._failure(pending.final, lines)) from writer.cause
        files = {name: list(checksum) for _, written in outcomes for name, checksum in written.items()}
        from_main_rank(lambda: self._put_in_place(pending, dict(sorted(files.items()))))
        if pending.best:
            self.best = pending.manifest.step

    def keep_as_best(self, step: int) -> bool:
        """Make the checkpoint of a step the best one; False when there is none. Every rank must call it."""

        def keep() -> bool:
            final = self.folder / f"step-{step:06d}"
            if not (final / MANIFEST).is_file():
                return False
            self.best = step
            self._prune_or_warn(final, _is_kept(final))
            return True

        kept: bool = from_main_rank(keep)
        self.best = step if kept else self.best
        return kept

    def close(self) -> None:
        """Give up what is pending; a hidden folder is all that is left of it. Does not communicate."""
        self._wait_for_removal()
        if self._pending is not None:
            self._pending.writer.abandon()
            self._pending = None

    def _prepare(self, temporary: Path, final: Path) -> None:
        """Make the empty folder that all ranks write into. Raises UserError."""
        self._wait_for_removal()
        try:
            # Made anew it could lie below the mount point of a file system that has gone.
            if self._must_exist and not self.run_dir.is_dir():
                raise FileNotFoundError
            self.folder.mkdir(parents=True, exist_ok=True)
            restore_replaced(self.run_dir)
            for path in self.folder.iterdir():  # what a killed run left
                if TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(self._failure(final, [f"rank 0: {disk_message(error)}"])) from error

    def _failure(self, final: Path, lines: list[str]) -> str:
        if not self.run_dir.is_dir():
            return f"{final}: the checkpoint could not be written: the run directory {self.run_dir} is no longer there"
        newest = self.newest
        return f"{final}: the checkpoint could not be written ({'; '.join(lines)}); nothing of it was kept, " + (
            f"the newest checkpoint is still {newest}" if newest else "there is none before it"
        )

    def _put_in_place(self, pending: _Pending, files: dict[str, list[int | str]]) -> None:
        """Write the manifest, give the checkpoint its name and remove those it replaces. Raises UserError."""
        temporary, final = pending.temporary, pending.final
        try:
            write_json(temporary / MANIFEST, asdict(replace(pending.manifest, files=files)))
            _sync_folder(temporary)
            self._rename(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(self._failure(final, [f"rank 0: {disk_message(error)}"])) from error
        _sync_folder(self.folder)
        if pending.best:
            self.best = pending.manifest.step
        self._prune_or_warn(final, pending.manifest.permanent)

    def _prune_or_warn(self, final: Path, permanent: bool) -> None:
        try:
            self._prune(final, permanent)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning("%s: older checkpoints could not be removed: %s", self.folder, disk_message(error))

    def _rename(self, temporary: Path, final: Path) -> None:
        if not final.exists():
            os.replace(temporary, final)
            return
        replaced = temporary.with_name(f".{final.name}.old.tmp")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        try:
            os.replace(temporary, final)
        except OSError:
            os.replace(replaced, final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, final: Path, permanent: bool) -> None:
        older = [
            path
            for step, path in complete_checkpoints(self.folder)
            if path != final and step != self.best and not _is_kept(path)
        ]
        keep = self.settings.keep - (not permanent)
        hidden = []
        for path in older[: max(0, len(older) - keep)]:
            # Out of sight first: a kill in the middle of the removal must not leave half a checkpoint behind.
            hidden.append(path.with_name(f".{path.name}.tmp"))
            os.replace(path, hidden[-1])
        if hidden:
            self._remove(hidden)

    def _remove(self, folders: list[Path]) -> None:
        """Remove folders beside the training: a file system takes a while for large files."""
        self._wait_for_removal()
        self._removal = Thread(
            target=lambda: [shutil.rmtree(folder, ignore_errors=True) for folder in folders],
            name="checkpoint removal",
            daemon=True,
        )
        self._removal.start()
        if not self.settings.asynchronous:
            self._wait_for_removal()

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join(_PATIENCE_S)
            self._removal = None


def _is_kept(path: Path) -> bool:
    """Whether a checkpoint is permanent, or says nothing that can be read and is for a person to judge."""
    try:
        return read_manifest(path).permanent
    except UserError:
        return True


def _write(engine: Engine, writer: CheckpointWriter) -> None:
    """Let DeepSpeed hand its files to the writer."""
    engine.deepspeed.checkpoint_engine = storage(writer)
    # DeepSpeed drops scripts beside the checkpoints, outside of what can be undone; `mmd2v export` does their work.
    engine.deepspeed._copy_recovery_script = lambda save_path: None
    with quiet():
        folder = writer.folder
        engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def _sync_folder(folder: Path) -> None:
    """Make names in a folder last through a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no such operation
            os.fsync(handle)
    finally:
        os.close(handle)
