"""Putting a checkpoint's state into an engine, after seeing that it is of this run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmd2v.config.structure import differences, structure
from mmd2v.distributed.coordination import from_main_rank, on_every_rank
from mmd2v.errors import UserError
from mmd2v.train.checkpoints.manifest import Manifest, read_manifest
from mmd2v.train.checkpoints.plain_paths import plain_path
from mmd2v.train.checkpoints.resharding import load_resharded, needs_conversion, stages_fit
from mmd2v.train.checkpoints.storage import storage
from mmd2v.train.engine import Engine, quiet
from mmd2v.train.rank_state import load_rank_state

_DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What DeepSpeed, torch and safetensors raise for files that are not what they should be."""


def load_checkpoint(engine: Engine, path: Path, expected: Manifest) -> Manifest:
    """Put a checkpoint's state into the engine; every rank must call it. Returns the checkpoint's manifest.

    ``expected`` is `describe` of the present run. The checkpoint may be of another number of ranks: what was done
    about it is left in ``engine.converted``. Raises UserError listing what differs, or naming a damaged file.
    """
    manifest = from_main_rank(lambda: _fitting_manifest(path, expected))
    engine.deepspeed.checkpoint_engine = storage()
    seconds = None
    try:
        with quiet():
            if needs_conversion(manifest, expected):
                seconds = load_resharded(engine, path, f"step-{manifest.step:06d}")
            else:
                _load(engine, path)
    except _DAMAGE as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: the checkpoint is damaged: {first_line}") from error
    on_every_rank(lambda: load_rank_state(engine.module.objectives, path, manifest.world_size))
    engine.converted = _what_was_done(manifest, expected, seconds)
    return manifest


def _load(engine: Engine, path: Path) -> None:
    with plain_path(path) as plain:
        loaded, _ = engine.deepspeed.load_checkpoint(str(plain.parent), tag=plain.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise FileNotFoundError("files of DeepSpeed are missing")


def _what_was_done(found: Manifest, expected: Manifest, seconds: float | None) -> str:
    """Return the end of the line that says where a run continues; it is empty when ranks and stage are as they were."""
    parts = []
    if found.world_size != expected.world_size:
        parts.append(f"written by {_ranks(found.world_size)}, resumed by {expected.world_size}")
    if found.zero_stage != expected.zero_stage:
        parts.append(f"written at ZeRO-{found.zero_stage}, resumed at ZeRO-{expected.zero_stage}")
    if not parts:
        return ""
    done = "" if seconds is None else f": converted to a universal checkpoint in {seconds:.1f} s"
    return ", " + ", ".join(parts) + done


def _ranks(number: int) -> str:
    return f"{number} rank" + "s" * (number > 1)


def _fitting_manifest(path: Path, expected: Manifest) -> Manifest:
    manifest = read_manifest(path)
    check_same_run(path, manifest, expected)
    return manifest


def check_same_run(path: Path, found: Manifest, expected: Manifest) -> None:
    """Raise UserError when a checkpoint does not fit the present run, listing every key that differs.

    The number of ranks may differ, and so may what follows from it: micro-batch and accumulation.
    """
    keys = {
        "precision": "engine.precision",
        "optimizer": "optimiser",
        "batch_size": "engine.batch_size",
    }
    lines = [
        f"{label}: checkpoint {getattr(found, key)}, this run {getattr(expected, key)}"
        for key, label in keys.items()
        if getattr(found, key) != getattr(expected, key)
    ]
    if not stages_fit(found.zero_stage, expected.zero_stage):
        lines.append(
            f"engine.zero_stage: checkpoint {found.zero_stage}, this run {expected.zero_stage} (only 1 and 2 may be "
            f"exchanged)"
        )
    for key, value in (found.stream or {}).items():
        lines += differences(key, value, (expected.stream or {}).get(key))
    # Shapes alone would let other heads, norms or poolings pass.
    lines += differences("model", structure(found.model), structure(expected.model))
    if found.parameters != expected.parameters:
        lines += differences("objectives", found.objectives, expected.objectives)
        lines += _parameter_differences(found.parameters, expected.parameters)
    if lines:
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
