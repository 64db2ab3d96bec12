"""Putting a checkpoint's state into an engine, after seeing that it is of this run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd2v.config.structure import differences, structure
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.errors import UserError
from mmd2v.train.checkpoints.manifest import Manifest, read_manifest
from mmd2v.train.checkpoints.storage import storage
from mmd2v.train.engine import Engine, quiet
from mmd2v.train.rank_state import load_rank_state


def load_checkpoint(engine: Engine, path: Path, expected: Manifest) -> Manifest:
    """Put a checkpoint's state into the engine; every rank must call it. Returns the checkpoint's manifest.

    ``expected`` is `describe` of the present run. Raises UserError listing what differs, or naming a damaged file.
    """
    manifest = from_main_rank(lambda: _fitting_manifest(path, expected))
    engine.deepspeed.checkpoint_engine = storage()
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
