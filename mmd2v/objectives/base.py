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


def weighted_mean(
    loss_BX: torch.Tensor, weights_B: torch.Tensor | None, mean_over: float | None = None
) -> torch.Tensor:
    """Return the mean of ``loss_BX`` [B, …], with rows of weight 0 adding nothing.

    The mean divides by all rows, whatever their weights: the sum over ranks is the same however the rows lie on them.
    Where micro-batches have different numbers of rows, it divides by ``mean_over`` instead of B: see `Batch.mean_over`.
    """
    if weights_B is not None:
        loss_BX = loss_BX * weights_B.view((-1,) + (1,) * (loss_BX.ndim - 1))
    mean = loss_BX.mean()
    return mean if mean_over is None else mean * (loss_BX.shape[0] / mean_over)
