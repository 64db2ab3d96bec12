"""Classification into one of several classes: fine-tuning on labelled images, or on labelled texts and pairs of them.

A pair of sentences is one text, with the tokenizer's separator between them, so that attention sees both.

Shapes: B samples, R rows of the modality, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import ClassificationConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective, weighted_mean


class Classification(Objective):
    """Cross-entropy of a linear head on the pooled output of one modality."""

    def __init__(
        self, config: ClassificationConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        if config.modality not in student.inputs:
            raise UserError(f"{where}.modality: '{config.modality}' is none of {', '.join(student.inputs)}")
        self.config = config
        self.where = where
        self.is_text = student.inputs[config.modality] == "text"
        self.head = nn.Linear(student.config.width, config.classes)
        self._right: torch.Tensor | None = None

    def logits(self, output: StudentOutput) -> torch.Tensor:
        """Return fp32 [R, C]."""
        return self.head(output.pooled[self.config.modality]).float()

    def labels(self, batch: Batch) -> torch.Tensor:
        """Return float32 [R, C], a 1 at the class of each row's sample."""
        if batch.labels is None or batch.labels.shape[1] != self.config.classes:
            found = "none" if batch.labels is None else batch.labels.shape[1]
            raise UserError(f"{self.where}.classes: samples carry {found} labels, expected {self.config.classes}")
        # Rows are captions, of which a sample may have several.
        return batch.labels[batch.caption_image] if self.is_text else batch.labels

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``classification_loss``."""
        logits_RC = self.logits(output)
        labels_RC = self.labels(batch)[: len(logits_RC)]  # none where the samples have no image
        weights_R = batch.caption_weights if self.is_text else batch.weights
        loss_R = F.cross_entropy(logits_RC, labels_RC, reduction="none", label_smoothing=self.config.label_smoothing)
        if len(logits_RC):
            right_R = logits_RC.detach().argmax(dim=1) == labels_RC.argmax(dim=1)
            self._right = right_R.float().mean()
        return {"classification_loss": weighted_mean(loss_R, weights_R, batch.mean_over)}

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return the accuracy on the newest micro-batch of this rank."""
        return {} if self._right is None else {"classification_accuracy": self._right}
