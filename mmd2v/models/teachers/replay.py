"""Stored outputs in a teacher's place: the loader reads them, no model is loaded.

Shapes: B images, N captions, D the teacher's width, T E tokens and their width.
"""

from __future__ import annotations

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.annotation_record import Annotation
from mmd2v.data.batch import Batch
from mmd2v.data.stored_outputs import tokens_key
from mmd2v.models.teachers.base import Targets, Teacher


class ReplayTeacher(Teacher):
    """Gives what `mmd2v data annotate` stored of the teacher ``name`` and the loader put into the batch."""

    takes_nothing = True

    def __init__(self, name: str, config: TeacherConfig, annotation: Annotation) -> None:
        super().__init__(config)
        self.name = name
        self.width = annotation.width
        self._token_width = None if annotation.tokens is None else annotation.tokens[1]

    @property
    def token_width(self) -> int | None:
        """See `Teacher.token_width`."""
        return self._token_width

    def encode(self, batch: Batch) -> Targets:
        """Return the batch's stored outputs [B or N, D], and [B, T, E] if tokens are stored."""
        return Targets(batch.teacher_outputs[self.name], batch.teacher_outputs.get(tokens_key(self.name)))
