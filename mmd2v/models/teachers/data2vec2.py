"""data2vec 2.0 checkpoints, converted by `mmd2v convert`, as teachers."""

from __future__ import annotations

from mmd2v.config.schema import TeacherConfig
from mmd2v.errors import UserError
from mmd2v.models.checkpoints.student import converted_student
from mmd2v.models.teachers.student import StudentTeacher


class Data2Vec2Teacher(StudentTeacher):
    """``data2vec2-image:FOLDER`` and ``data2vec2-text:FOLDER``; the CLS is the last block's (there is no norm)."""

    def __init__(self, family: str, folder: str, config: TeacherConfig, where: str) -> None:
        modality = family.rpartition("-")[2]
        if config.modality != modality:
            raise UserError(f"{where}: '{family}' sees {modality}; set modality: {modality}, found {config.modality}")
        if config.kwargs:
            raise UserError(f"{where}: a converted checkpoint takes no kwargs; remove them")
        model, architecture = converted_student(family, folder, where, config.mean, config.std)
        if config.image_size not in (None, architecture.image_size):
            raise UserError(f"{where}: image_size is {config.image_size}, but {folder} takes {architecture.image_size}")
        super().__init__(model, modality, architecture.image_size, config)
