"""An encoder that this project trained, as the teacher of the next stage."""

from __future__ import annotations

from mmd2v.config.schema import TeacherConfig
from mmd2v.errors import UserError
from mmd2v.models.exported import load_export_config, load_student
from mmd2v.models.teachers.student import StudentTeacher


class ExportTeacher(StudentTeacher):
    """``mmd2v:FOLDER``: the CLS is the pooled output of the export before its projection."""

    def __init__(self, folder: str, config: TeacherConfig, where: str) -> None:
        if config.mean is not None or config.std is not None or config.kwargs:
            raise UserError(f"{where}: an export brings its own mean, std and arguments; remove them")
        model = load_student(folder, where)
        names = [name for name, kind in model.inputs.items() if kind == config.modality]
        if not names:
            raise UserError(f"{where}: {folder} encodes {sorted(model.encoders)}, nothing of '{config.modality}'")
        image_size = load_export_config(folder, where).data.image.size
        if config.image_size not in (None, image_size):
            raise UserError(f"{where}: image_size is {config.image_size}, but {folder} takes {image_size}")
        super().__init__(model, names[0], image_size if config.modality == "image" else None, config)
