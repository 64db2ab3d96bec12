"""What an objective is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mmd2v.config.schema import ObjectiveConfig
from mmd2v.data.batch import Batch
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher


class Objective(nn.Module):
    """One term of the loss; ``where`` is its place in the config, for error messages."""

    def __init__(self, config: ObjectiveConfig, student: Student, teachers: Mapping[str, Teacher], where: str) -> None:
        super().__init__()

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return named scalar losses."""
        raise NotImplementedError  # an abstract method

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return named scalars to log beside the losses."""
        return {}
