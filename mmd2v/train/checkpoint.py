"""Checkpoints that exist whole or not at all, and continue a run exactly.

A checkpoint is a folder ``step-000100`` with DeepSpeed's files, a file a rank of what objectives keep (see
`rank_state`) and ``mmd2v.json``. All ranks write into
``.step-000100.tmp``; when every rank reports success, rank 0 renames it. What starts with a dot is never read; only
`restore_replaced` looks for a checkpoint that was put aside for its successor when the run was killed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmd2v.config.schema import Config
from mmd2v.config.structure import differences, structure
from mmd2v.data.stream import TrainFacts
from mmd2v.data.token_batches import TokenOrder
from mmd2v.distributed.collectives import barrier, gather_objects
from mmd2v.distributed.coordination import from_main_rank, on_every_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError, disk_message, nearest
from mmd2v.files import write_json
from mmd2v.train.engine import Engine, quiet
from mmd2v.train.optimizer import public_name
from mmd2v.train.rank_state import load_rank_state, save_rank_state

MANIFEST = "mmd2v.json"
AUTO = "auto"
_FOLDER = re.compile(r"step-(\d{6,})")
_TEMPORARY = re.compile(r"\.step-\d{6,}(\.old)?\.tmp")
_REPLACED = re.compile(r"\.(step-\d{6,})\.old\.tmp")
_ABANDONED = "abandoned-"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What ``mmd2v.json`` of a checkpoint says."""

    format: int
    step: int
    """Finished optimiser steps."""
    sample_index: int
    """Position in the endless stream of training samples; in batches of tokens, where ``step`` is the position, how
    many samples were seen."""
    batch_size: int | None
    world_size: int
    zero_stage: int
    precision: str
    optimizer: str
    model: dict[str, Any]
    """The config's model section."""
    objectives: list[dict[str, Any]]
    parameters: dict[str, list[Any]]
    """Name → [shape, index of the optimiser group; null when frozen]."""
    stream: dict[str, Any] | None = None
    """Key of the config → value, of all that decides which samples come when; None: of a version that wrote none."""


def describe(
    engine: Engine,
    config: Config,
    world: World,
    step: int,
    sample_index: int,
    facts: TrainFacts,
    tokens: TokenOrder | None = None,
) -> Manifest:
    """Describe the checkpoint the engine would write after ``step`` steps, at position ``sample_index`` of the stream.

    ``facts`` are of the training set, ``tokens`` the order of its texts in batches of tokens.
    """
    group_of = {name: i for i, group in enumerate(engine.groups) for name in group.names}
    parameters = {
        public_name(name): [list(getattr(parameter, "ds_shape", parameter.shape)), group_of.get(public_name(name))]
        for name, parameter in engine.module.named_parameters()
    }
    return Manifest(
        format=_FORMAT,
        step=step,
        sample_index=sample_index,
        batch_size=config.engine.batch_size,
        world_size=world.size,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
        optimizer=engine.optimizer_name,
        model=config.model.model_dump(mode="json"),
        objectives=[objective.model_dump(mode="json") for objective in config.objectives],
        parameters=parameters,
        stream=_stream(config, facts) | _token_stream(tokens),
    )


def _token_stream(tokens: TokenOrder | None) -> dict[str, Any]:
    """What decides the order of batches of tokens besides: the length of every text enters it."""
    if tokens is None:
        return {}
    return {
        "data.tokenizer (fingerprint)": tokens.fingerprint,
        "data.train (texts)": tokens.texts,
        "data.train (tokens)": tokens.tokens,
    }


def _stream(config: Config, facts: TrainFacts) -> dict[str, Any]:
    tokenizer = config.data.tokenizer
    return {
        "seed": config.seed,
        "data.train (images)": facts.samples,
        "data.train (samples of each shard)": facts.layout,
        # With another order, a resumed epoch would repeat some samples and miss others.
        "data.shuffle_shards": config.data.shuffle_shards,
        "data.lanes": config.data.lanes,
        "data.last_batch": config.data.last_batch,
        "data.batch_tokens": config.data.batch_tokens,
        "data.train.mix": config.data.train.mix if config.data.train.sets else None,
        **{f"data.train.sets.{name}.weight": one.weight for name, one in config.data.train.sets.items()},
        "data.image.size": config.data.image.size,
        **{
            f"data.tokenizer.{key}": getattr(tokenizer, key) if tokenizer else None
            for key in ("kind", "max_length", "append_end")
        },
    }


# ------------------------------------------------------------------------------------------ finding


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the finished checkpoints under ``folder``, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def find_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """Return the checkpoint a run starts from, None for a new run.

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


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest. Raises UserError when it is damaged or of another format."""
    file = path / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{file}: found checkpoint format {found!r}; this version reads {_FORMAT}")
    try:
        return Manifest(**values)
    except TypeError as error:
        raise UserError(f"{file}: not a manifest of a checkpoint: {error}") from None


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
            target = path.with_name(_ABANDONED + path.name)
            shutil.rmtree(target, ignore_errors=True)  # of a branch that was left before
            os.replace(path, target)
            aside.append(target.name)
    if not aside:
        return None
    return f"going back to step {step}; later checkpoints are set aside as {', '.join(aside)} (remove them at will)"


# ------------------------------------------------------------------------------------------- saving


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
            error = _guarded(lambda: save_rank_state(engine.module.objectives, temporary))
        if error is None and self.world.is_main and extra is not None:
            error = _guarded(lambda: extra(temporary))
        if error is None and self.world.is_main:
            error = _guarded(lambda: write_json(temporary / MANIFEST, asdict(manifest)))
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
        message = _guarded(lambda: temporary.mkdir(parents=True, exist_ok=True))
        if message:
            raise UserError(f"{self.folder}: {message}")
        for path in self.folder.iterdir():  # what a killed run left
            if _TEMPORARY.fullmatch(path.name):
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
    storage = _storage()
    engine.deepspeed.checkpoint_engine = storage
    # DeepSpeed drops scripts beside the checkpoints, outside of what can be undone; `mmd2v export` does their work.
    engine.deepspeed._copy_recovery_script = lambda save_path: None
    with quiet():
        engine.deepspeed.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False)
    return storage.error


def _guarded(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except OSError as error:
        return disk_message(error)
    return None


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------- DeepSpeed's storage


def _storage() -> Any:
    """Return a DeepSpeed checkpoint engine that remembers write errors and reads tensors and plain values only.

    DeepSpeed ends a save with a barrier: a rank that raised before it would leave the others waiting. And its own
    reader unpickles whatever a file says.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Storage(CheckpointEngine):
        error: str | None = None

        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            if self.error is None:
                self.error = _guarded(lambda: _save_file(state_dict, path))

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            if self.error is None:
                self.error = _guarded(lambda: os.makedirs(path, exist_ok=exist_ok))

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(deepspeed_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: Any) -> bool:
            return True

    return Storage()


def _save_file(value: Any, path: str) -> None:
    with open(path, "wb") as handle:
        try:
            torch.save(value, handle)
        except RuntimeError as error:
            # torch's archive, closed after a failed write, complains about its own position instead of the disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        handle.flush()
        os.fsync(handle.fileno())


def deepspeed_classes() -> list[Any]:
    """Classes of DeepSpeed and torch that its checkpoints name."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


# ------------------------------------------------------------------------------------------- loading


def load_checkpoint(engine: Engine, path: Path, expected: Manifest) -> Manifest:
    """Put a checkpoint's state into the engine; every rank must call it. Returns the checkpoint's manifest.

    ``expected`` is `describe` of the present run. Raises UserError listing what differs, or naming a damaged file.
    """
    manifest = from_main_rank(lambda: _fitting_manifest(path, expected))
    engine.deepspeed.checkpoint_engine = _storage()
    try:
        with quiet():
            loaded, _ = engine.deepspeed.load_checkpoint(
                str(path.parent), tag=path.name, load_lr_scheduler_states=False
            )
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the checkpoint is damaged: {str(error).splitlines()[0]}") from error
    if loaded is None:
        raise UserError(f"{path}: the checkpoint is damaged: files of DeepSpeed are missing")
    on_every_rank(lambda: load_rank_state(engine.module.objectives, path))
    return manifest


def _fitting_manifest(path: Path, expected: Manifest) -> Manifest:
    manifest = read_manifest(path)
    check_same_run(path, manifest, expected)
    return manifest


def check_same_run(path: Path, found: Manifest, expected: Manifest) -> None:
    """Raise UserError when a checkpoint does not fit the present run, listing every key that differs."""
    keys = {
        "world_size": "ranks",
        "zero_stage": "engine.zero_stage",
        "precision": "engine.precision",
        "optimizer": "optimiser",
        "batch_size": "engine.batch_size",
    }
    lines = [
        f"{label}: checkpoint {getattr(found, key)}, this run {getattr(expected, key)}"
        for key, label in keys.items()
        if getattr(found, key) != getattr(expected, key)
    ]
    for key, value in (found.stream or {}).items():
        lines += differences(key, value, (expected.stream or {}).get(key))
    # Shapes alone would let other heads, norms or poolings pass.
    lines += differences("model", structure(found.model), structure(expected.model))
    if found.parameters != expected.parameters:
        lines += differences("objectives", found.objectives, expected.objectives)
        lines += _parameter_differences(found.parameters, expected.parameters)
    if not lines:
        return
    if found.world_size != expected.world_size and len(lines) == 1:
        raise UserError(
            f"{path}: written by {found.world_size} ranks, resumed by {expected.world_size}; start it with "
            f"{found.world_size}, for example: deepspeed --num_accelerators {found.world_size} --module mmd2v train …"
        )
    raise UserError(f"{path}: the checkpoint is of another run than this config:\n  " + "\n  ".join(lines))


def _parameter_differences(
    found: Mapping[str, list[Any]], expected: Mapping[str, list[Any]], limit: int = 5
) -> list[str]:
    lines = []
    for name in [*found, *(name for name in expected if name not in found)]:
        if found.get(name) != expected.get(name):
            old, new = (_parameter(values.get(name)) for values in (found, expected))
            lines.append(f"parameter {name}: checkpoint {old}, this run {new}")
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more parameters"]


def _parameter(value: list[Any] | None) -> str:
    if value is None:
        return "has none"
    shape, group = value
    return f"{shape} " + ("frozen" if group is None else f"in optimiser group {group}")
