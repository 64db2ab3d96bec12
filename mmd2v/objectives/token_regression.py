"""Regression of the teacher's last tokens, one by one.

Shapes: B samples, T tokens, D student width, C teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from mmd2v.config.schema import TokenRegressionConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective, token_mean, weighted_mean
from mmd2v.objectives.heads import regression_head


class TokenRegression(Objective):
    """Mean distance of head(token) to the teacher's token at the same place, over a sample's tokens, then samples."""

    def __init__(
        self, config: TokenRegressionConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        self.where = where
        self.kind = student.inputs[config.modality]
        teacher = teachers[config.teacher]
        if teacher.modality != self.kind:
            raise UserError(
                f"{where}.teacher: '{config.teacher}' sees {teacher.modality}, {config.modality} is {self.kind}"
            )
        if teacher.token_width is None:
            raise UserError(f"{where}.teacher: '{config.teacher}' gives no tokens")
        self.head = regression_head(config.head, student.config.width, teacher.token_width, f"{where}.head")

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``token_regression_loss/MODALITY``."""
        assert output.tokens is not None
        modality, layout = self.config.modality, output.tokens.layout
        target_BTC = targets[self.config.teacher].tokens_BTD
        own_BTD = layout.rectangle(output.tokens.x_TD, modality)
        if len(own_BTD) == 0:
            return {f"token_regression_loss/{modality}": self.head(own_BTD).float().sum()}
        is_token_BT = layout.is_token(modality)
        assert target_BTC is not None  # it has a token width
        if target_BTC.shape[1] == own_BTD.shape[1] - 1:  # a CNN's map has no CLS
            own_BTD = own_BTD[:, 1:]
            is_token_BT = None if is_token_BT is None else is_token_BT[:, 1:]
        if target_BTC.shape[:2] != own_BTD.shape[:2]:
            raise UserError(
                f"{self.where}: the student has {own_BTD.shape[1]} tokens a sample, '{self.config.teacher}' "
                f"{target_BTC.shape[1]}; expected the same grid, with a CLS or without"
            )
        target_BTC = target_BTC.float()
        if self.config.normalize == "layer_norm":
            target_BTC = F.layer_norm(target_BTC, target_BTC.shape[-1:])
        loss_BT = self._distance(self.head(own_BTD).float(), target_BTC)
        weights = batch.caption_weights if self.kind == "text" else batch.weights
        loss = weighted_mean(token_mean(loss_BT, is_token_BT), weights, batch.mean_over)
        return {f"token_regression_loss/{modality}": loss}

    def _distance(self, prediction_BTC: torch.Tensor, target_BTC: torch.Tensor) -> torch.Tensor:
        """[B, T]"""
        if self.config.loss == "cosine":
            return 1 - F.cosine_similarity(prediction_BTC, target_BTC, dim=-1)
        distance = F.mse_loss if self.config.loss == "mse" else F.smooth_l1_loss
        return distance(prediction_BTC, target_BTC, reduction="none").mean(dim=-1)
