"""Frozen teachers. They live outside the training engine, always in eval mode, and enter no checkpoint. (One that
averages the student moves after each step and is kept.)

Adding a kind of teacher is one file here and one line in ``TEACHERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mmd2v.config.schema import Config, TeacherConfig
from mmd2v.data.annotation_record import Annotation
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.errors import UserError, unknown_name
from mmd2v.models.student import Student
from mmd2v.models.teachers.base import Needs, Targets, Teacher
from mmd2v.models.teachers.beit2 import BEiT2Teacher
from mmd2v.models.teachers.data2vec2 import Data2Vec2Teacher
from mmd2v.models.teachers.ema import EMATeacher
from mmd2v.models.teachers.exported import ExportTeacher
from mmd2v.models.teachers.hf import hf_teacher
from mmd2v.models.teachers.replay import ReplayTeacher
from mmd2v.models.teachers.timm import TimmTeacher

TEACHERS: dict[str, Callable[[str, TeacherConfig, str], Teacher]] = {
    "timm": TimmTeacher,
    "hf": hf_teacher,
    "mmd2v": ExportTeacher,
    "data2vec2-image": partial(Data2Vec2Teacher, "data2vec2-image"),
    "data2vec2-text": partial(Data2Vec2Teacher, "data2vec2-text"),
    "beit2": BEiT2Teacher,
}
"""Prefix of a teacher's name → (rest of the name, config, where in the config) → teacher."""


def load(name: str, *, device: str | torch.device = "cpu", **options: Any) -> Teacher:
    """Load a teacher by its name, such as ``timm:resnet50`` or ``hf:FOLDER``.

    ``options`` are fields of :class:`mmd2v.config.schema.TeacherConfig`. Raises UserError for a name that does not
    exist.
    """
    return _build(TeacherConfig(name=name, **options), torch.device(device), f"teacher {name}")


def build_teachers(
    config: Config,
    device: torch.device,
    tokenizer: Tokenizer | None = None,
    replayed: Mapping[str, Annotation] | None = None,
    student: Student | None = None,
) -> dict[str, Teacher]:
    """Load every teacher of a run onto ``device``; those that are ``replayed`` from stored outputs are not loaded.

    An `ema:MODALITY` starts as a copy of ``student``. Raises UserError for a name that does not exist, or a text
    teacher whose vocabulary is not the tokenizer's.
    """
    teachers: dict[str, Teacher] = {}
    for name, teacher_config in config.teachers.items():
        if replayed and name in replayed:
            teachers[name] = ReplayTeacher(name, teacher_config, replayed[name])
            continue
        where = f"teachers.{name}.name"
        if teacher_config.averaged is not None:
            if student is None:
                raise UserError(f"{where}: '{teacher_config.name}' averages a student in training; there is none here")
            teachers[name] = EMATeacher(student, teacher_config.averaged, teacher_config).freeze(device)
            continue
        teacher = _build(teacher_config, device, where)
        if teacher.vocab_size is not None and tokenizer is not None and tokenizer.vocab_size > teacher.vocab_size:
            raise UserError(
                f"{where}: its embedding table has {teacher.vocab_size} rows, but data.tokenizer has "
                f"{tokenizer.vocab_size} ids: they do not belong together"
            )
        if teacher.max_length is not None and tokenizer is not None and tokenizer.max_length > teacher.max_length:
            raise UserError(
                f"data.tokenizer.max_length: found {tokenizer.max_length}, {where} has {teacher.max_length} positions"
            )
        teachers[name] = teacher
    return teachers


def _build(config: TeacherConfig, device: torch.device, where: str) -> Teacher:
    kind, _, rest = config.name.partition(":")
    if config.averaged is not None:
        raise UserError(f"{where}: '{config.name}' averages the student of a run; it cannot be loaded by itself")
    if not rest:
        raise UserError(
            f"{where}: found '{config.name}', expected timm:NAME[@WEIGHTS], or one of "
            f"{', '.join(f'{k}:…' for k in TEACHERS if k != 'timm')}"
        )
    if kind not in TEACHERS:
        raise unknown_name(where, kind, TEACHERS)
    teacher = TEACHERS[kind](rest, config, where)
    return teacher.freeze(device)


__all__ = ["TEACHERS", "EMATeacher", "Needs", "ReplayTeacher", "Targets", "Teacher", "build_teachers", "load"]
