"""Multi-label classification of what is known of a sample: how a teacher is trained on an own domain.

Shapes: B samples, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import AttributesConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective, weighted_mean


class Attributes(Objective):
    """Mean binary cross-entropy over attributes and samples.

    Logits start at the log-odds of ``prior``: from zero, the first hundreds of steps would only learn that most
    attributes are absent (Lin et al. 2017, section 3.3).
    """

    def __init__(self, config: AttributesConfig, student: Student, teachers: Mapping[str, Teacher], where: str) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        self.where = where
        self.is_text = student.inputs[config.modality] == "text"
        self.head = nn.Linear(student.config.width, config.classes)
        self.offset = math.log(config.prior / (1 - config.prior))

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``attributes_loss``."""
        if batch.labels is None or batch.labels.shape[1] != self.config.classes:
            found = "none" if batch.labels is None else batch.labels.shape[1]
            raise UserError(f"{self.where}.classes: samples carry {found} labels, expected {self.config.classes}")
        logits_BA = self.head(output.pooled[self.config.modality]).float() + self.offset
        labels_BA, weights_B = batch.labels, batch.weights
        if self.is_text:  # rows are captions, of which an image may have several
            labels_BA, weights_B = labels_BA[batch.caption_image], batch.caption_weights
        labels_BA = labels_BA[: len(logits_BA)]  # none where the samples have no image
        loss_BA = F.binary_cross_entropy_with_logits(logits_BA, labels_BA, reduction="none")
        return {"attributes_loss": weighted_mean(loss_BA, weights_B, batch.mean_over)}
