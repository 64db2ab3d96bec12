"""What an objective is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmd2v.config.schema import ObjectiveConfig
from mmd2v.data.batch import Batch
from mmd2v.models.student import Student, StudentOutput, Wanted
from mmd2v.models.teachers import Needs, Targets, Teacher


class Objective(nn.Module):
    """One term of the loss; ``where`` is its place in the config, for error messages."""

    def __init__(self, config: ObjectiveConfig, student: Student, teachers: Mapping[str, Teacher], where: str) -> None:
        super().__init__()

    @property
    def wanted(self) -> Wanted:
        """What the student is to keep of a forward pass for this term."""
        return Wanted()

    @property
    def needs(self) -> dict[str, Needs]:
        """Teacher → what it is to give for this term besides CLS and tokens."""
        return {}

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return named scalar losses."""
        raise NotImplementedError  # an abstract method

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return named scalars to log beside the losses."""
        return {}

    def rank_state(self) -> dict[str, torch.Tensor]:
        """Return what this rank alone must keep to continue the run exactly, besides parameters and buffers.

        Each rank writes its own into the checkpoint. It is no part of the module's state: nobody averages it over
        ranks, casts or exports it.
        """
        return {}

    def load_rank_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `rank_state` returned on this rank, on the CPU. Raises UserError when it does not fit."""

    def dealt_state(self, states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return this rank's share of what `rank_state` returned on all ranks of a run of another number of them.

        ``states`` are in the order of those ranks, on the CPU. Raises UserError when it does not fit.
        """
        raise NotImplementedError  # of every objective that has a `rank_state`


def weighted_mean(
    loss_BX: torch.Tensor, weights_B: torch.Tensor | None, mean_over: float | None = None
) -> torch.Tensor:
    """Return the mean of ``loss_BX`` [B, …], with rows of weight 0 adding nothing.

    The mean divides by all rows, whatever their weights: the sum over ranks is the same however the rows lie on them.
    Where micro-batches have different numbers of rows, it divides by ``mean_over`` instead of B: see `Batch.mean_over`.
    Of no rows it is 0, with a gradient of zeros.
    """
    if loss_BX.shape[0] == 0:
        return loss_BX.sum()
    if weights_B is not None:
        loss_BX = loss_BX * weights_B.view((-1,) + (1,) * (loss_BX.ndim - 1))
    mean = loss_BX.mean()
    return mean if mean_over is None else mean * (loss_BX.shape[0] / mean_over)


def token_mean(loss_BT: torch.Tensor, counts_BT: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over each sample's tokens, [B]; ``counts_BT`` (bool) says which of them count, None: all.

    A mean a sample and not one over the tokens of a batch: the loss is the same however the samples lie on ranks.
    """
    if counts_BT is None:
        return loss_BT.mean(dim=1)
    counts_BT = counts_BT.to(loss_BT.dtype)
    return (loss_BT * counts_BT).sum(dim=1) / counts_BT.sum(dim=1).clamp(min=1)
