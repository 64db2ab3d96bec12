"""The averages of the student that serve as teachers: moved after every step, and a file of theirs in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmd2v.errors import UserError
from mmd2v.models.teachers import EMATeacher, Teacher
from mmd2v.train.checkpoints.writer import CheckpointWriter
from mmd2v.train.engine import Engine

AVERAGES_FILE = "averages.safetensors"
"""Of a checkpoint: ``TEACHER/NAME`` → fp32, the names as in the student."""


def averages(teachers: Mapping[str, Teacher]) -> dict[str, EMATeacher]:
    """Return the teachers that average the student."""
    return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, EMATeacher)}


def update_averages(teachers: Mapping[str, Teacher], engine: Engine, step: int, steps: int) -> None:
    """Move every average towards the student after step ``step`` (from 1) of ``steps``; every rank must call it.

    The student's parameters are whole and equal on all ranks (ZeRO-3 gathers them for it), so are the averages then.
    """
    student = engine.module.student
    for teacher in averages(teachers).values():
        with engine.gathered(teacher.followed(student)):
            teacher.update(student, teacher.ema.decay_at(step, steps))


def save_averages(teachers: Mapping[str, Teacher], writer: CheckpointWriter) -> None:
    """Hand the file of the averages to a checkpoint, if there are any; rank 0 alone calls it."""
    state = {f"{name}/{key}": x for name, teacher in averages(teachers).items() for key, x in teacher.average().items()}
    if state:
        writer.add_tensors(AVERAGES_FILE, state)


def load_averages(teachers: Mapping[str, Teacher], folder: Path) -> None:
    """Put the averages of a checkpoint into the teachers.

    Raises UserError when the file is missing or damaged, or another model's.
    """
    found = averages(teachers)
    if not found:
        return
    state = read_averages(folder)
    for name, teacher in found.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
        if not own:
            stored = ", ".join(sorted({key.partition("/")[0] for key in state}))
            raise UserError(f"{folder / AVERAGES_FILE}: found averages of {stored}, none of teachers.{name}")
        teacher.load_average(own, str(folder / AVERAGES_FILE))


def read_averages(folder: Path) -> dict[str, torch.Tensor]:
    """Return what a checkpoint's file holds. Raises UserError when it is missing or damaged."""
    path = folder / AVERAGES_FILE
    if not path.is_file():
        raise UserError(f"{folder}: found no {AVERAGES_FILE}; the run that wrote it had no ema:MODALITY teacher")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
