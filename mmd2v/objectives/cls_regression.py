"""Regression of a teacher's CLS from every modality: the source's multimodal loss.

Shapes: B images, N captions, D student width, C teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import CLSRegressionConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective, weighted_mean
from mmd2v.objectives.heads import regression_head
from mmd2v.objectives.pairs import paired


class CLSRegression(Objective):
    """Mean distance of head(pooled) to the teacher's CLS of the same sample, one loss a modality."""

    def __init__(
        self, config: CLSRegressionConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        kind, _, modality = config.teacher.partition(":")
        self.own_encoder = modality if kind == "encoder" else None
        width = student.config.width
        self.inputs = student.inputs
        if self.own_encoder:
            target_width = student.encoders[modality].feature_width
            if target_width is None:
                raise UserError(f"{where}.teacher: the encoder '{modality}' has no pooled feature to regress")
            self.teacher_modality = student.inputs[modality]
        else:
            target_width = teachers[config.teacher].width
            self.teacher_modality = teachers[config.teacher].modality
        self.modalities = config.modalities or list(student.inputs)
        owners = ["shared"] if config.shared_head else self.modalities
        self.heads = nn.ModuleDict(
            {owner: regression_head(config.head, width, target_width, f"{where}.head") for owner in owners}
        )

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``cls_regression_loss/MODALITY``."""
        target_BC = self._target(output, targets)
        losses = {}
        for modality in self.modalities:
            head = self.heads["shared" if self.config.shared_head else modality]
            prediction = head(output.pooled[modality]).float()
            texts = self.inputs[modality] == "text", self.teacher_modality == "text"
            prediction_NC, target_NC, weights_N = paired(prediction, target_BC, *texts, batch)
            loss = weighted_mean(self._distance(prediction_NC, target_NC), weights_N, batch.mean_over)
            losses[f"cls_regression_loss/{modality}"] = loss
        return losses

    def _target(self, output: StudentOutput, targets: Mapping[str, Targets]) -> torch.Tensor:
        target_BC = output.features[self.own_encoder] if self.own_encoder else targets[self.config.teacher].cls_BD
        if self.config.normalize == "layer_norm":
            return F.layer_norm(target_BC, target_BC.shape[-1:])
        return F.normalize(target_BC, dim=-1) if self.config.normalize == "l2" else target_BC

    def _distance(self, prediction_NC: torch.Tensor, target_NC: torch.Tensor) -> torch.Tensor:
        """[N, C], or [N] of the cosine."""
        if self.config.loss == "mse":
            return F.mse_loss(prediction_NC, target_NC, reduction="none")
        if self.config.loss == "smooth_l1":
            return F.smooth_l1_loss(prediction_NC, target_NC, reduction="none")
        return 1 - F.cosine_similarity(prediction_NC, target_NC)
