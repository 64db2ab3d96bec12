"""The part of a checkpoint that each rank writes for itself: what the objectives keep beside parameters and buffers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mmd2v.distributed.collectives import rank, world_size
from mmd2v.errors import UserError
from mmd2v.objectives import Objectives
from mmd2v.train.checkpoints.writer import CheckpointWriter

_RANKS = "ranks"


def rank_file(folder: Path, number: int | None = None) -> Path:
    """Return the file of a rank in a checkpoint, of this one when none is named."""
    return folder / f"objectives_rank_{rank() if number is None else number:05d}.safetensors"


def save_rank_state(objectives: Objectives, writer: CheckpointWriter) -> None:
    """Hand this rank's file to a checkpoint, unless no objective keeps anything."""
    state = objectives.rank_state()
    if state:
        writer.add_tensors(rank_file(writer.folder).name, state, {_RANKS: str(world_size())})


def load_rank_state(objectives: Objectives, folder: Path, ranks: int | None = None) -> None:
    """Read this rank's file of a checkpoint of ``ranks`` ranks (none: as many as now), where objectives keep anything.

    With another number of ranks now, read the files of all of them: the objectives deal it anew. Raises UserError when
    a file is missing or does not fit. Does not communicate.
    """
    if not objectives.rank_state():
        return
    if ranks is None or ranks == world_size():
        state = _read(rank_file(folder), rank(), world_size())
    else:
        state = objectives.dealt_state([_read(rank_file(folder, number), number, ranks) for number in range(ranks)])
    objectives.load_rank_state(state)


def _read(path: Path, number: int, ranks: int) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: missing; the checkpoint lacks what rank {number} of the objectives needs to go on")
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(_RANKS)
            if written != str(ranks):
                raise UserError(f"{path}: the checkpoint is damaged: written by {written} ranks, expected {ranks}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the checkpoint is damaged: {error}") from error
