"""The part of a checkpoint that each rank writes for itself: what the objectives keep beside parameters and buffers."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from mmd2v.distributed.collectives import rank, world_size
from mmd2v.errors import UserError
from mmd2v.objectives import Objectives
from mmd2v.train.checkpoints.writer import CheckpointWriter

_RANKS = "ranks"


def rank_file(folder: Path) -> Path:
    """Return the file of this rank in a checkpoint."""
    return folder / f"objectives_rank_{rank():05d}.safetensors"


def save_rank_state(objectives: Objectives, writer: CheckpointWriter) -> None:
    """Hand this rank's file to a checkpoint, unless no objective keeps anything."""
    state = objectives.rank_state()
    if state:
        writer.add_tensors(rank_file(writer.folder).name, state, {_RANKS: str(world_size())})


def load_rank_state(objectives: Objectives, folder: Path) -> None:
    """Read this rank's file, where the objectives keep anything. Raises UserError when it is missing or does not fit.

    Does not communicate.
    """
    if not objectives.rank_state():
        return
    path = rank_file(folder)
    if not path.is_file():
        raise UserError(f"{path}: missing; the checkpoint lacks what rank {rank()} of the objectives needs to go on")
    try:
        with safe_open(path, framework="pt") as file:
            ranks = (file.metadata() or {}).get(_RANKS)
            if ranks != str(world_size()):
                raise UserError(f"{path}: written by {ranks} ranks, resumed by {world_size()}; start it with {ranks}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the checkpoint is damaged: {error}") from error
    objectives.load_rank_state(state)
