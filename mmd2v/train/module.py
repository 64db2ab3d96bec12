"""What the engine wraps: student and objectives in one module with one forward and one backward a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mmd2v.data.batch import Batch
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets
from mmd2v.objectives import Objectives


class TrainModule(nn.Module):
    """Student and objectives; ``autocast`` computes products in bf16 over fp32 weights.

    ``encoded_by`` is modality → the teacher that runs the student's encoder for both.
    """

    def __init__(
        self, student: Student, objectives: Objectives, autocast: bool, encoded_by: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = objectives
        self.autocast = autocast
        self.encoded_by = dict(encoded_by or {})
        self.wanted = objectives.wanted

    def forward(
        self, batch: Batch, targets: Mapping[str, Targets] | None, modalities: tuple[str, ...] | None = None
    ) -> dict[str, torch.Tensor] | StudentOutput:
        """Return every loss term by name and their weighted sum under ``loss``, all scalars on the device.

        Without ``targets`` return the student's output of ``modalities``: ZeRO-3 gathers weights for a pass through
        this module alone.
        """
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            if targets is None:
                return self.student(batch, modalities)
            # A teacher that ran the student's own frozen encoder has what enters the layers.
            sources = {name: targets.get(teacher) for name, teacher in self.encoded_by.items()}
            encoded = {name: one.encoded for name, one in sources.items() if one and one.encoded is not None}
            return self.objectives(self.student(batch, encoded=encoded, wanted=self.wanted), targets, batch)
