"""An encoder that this project trained, as the teacher of the next stage."""

from __future__ import annotations

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.exported import load_student
from mmd2v.models.teachers.base import Targets, Teacher


class ExportTeacher(Teacher):
    """``mmd2v:FOLDER``: the CLS is the pooled output of the export before its projection."""

    def __init__(self, folder: str, config: TeacherConfig, image_size: int, where: str) -> None:
        super().__init__(config)
        self.model = load_student(folder, where)
        if config.modality not in self.model.encoders:
            raise UserError(f"{where}: {folder} encodes {sorted(self.model.encoders)}, not '{config.modality}'")
        self.width = self.model.config.width
        self.vocab_size = getattr(self.model.encoders[config.modality], "vocab_size", None)

    def encode(self, batch: Batch) -> Targets:
        """Return the pooled vector of every sample."""
        return Targets(self.model(batch, (self.modality,)).pooled[self.modality])
