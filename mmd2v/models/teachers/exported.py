"""An encoder that this project trained, as the teacher of the next stage."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.exported import load_export_config, load_student
from mmd2v.models.images import resize
from mmd2v.models.teachers.base import Targets, Teacher


class ExportTeacher(Teacher):
    """``mmd2v:FOLDER``: the CLS is the pooled output of the export before its projection."""

    def __init__(self, folder: str, config: TeacherConfig, where: str) -> None:
        super().__init__(config)
        if config.mean is not None or config.std is not None or config.kwargs:
            raise UserError(f"{where}: an export brings its own mean, std and arguments; remove them")
        self.model = load_student(folder, where)
        names = [name for name, kind in self.model.inputs.items() if kind == config.modality]
        if not names:
            raise UserError(f"{where}: {folder} encodes {sorted(self.model.encoders)}, nothing of '{config.modality}'")
        self.name = names[0]
        self.image_size = load_export_config(folder, where).data.image.size
        if config.image_size not in (None, self.image_size):
            raise UserError(f"{where}: image_size is {config.image_size}, but {folder} takes {self.image_size}")
        self.width = self.model.config.width
        encoder = self.model.encoders[self.name]
        self.vocab_size = getattr(encoder, "vocab_size", None)
        self.max_length = getattr(encoder, "max_length", None)

    def encode(self, batch: Batch) -> Targets:
        """Return the pooled vector of every sample."""
        if self.modality == "image":
            batch = replace(batch, images=resize(batch.images, self.image_size).round().to(torch.uint8))
        return Targets(self.model(batch, (self.name,)).pooled[self.name])
