"""Sigmoid loss over all pairs of two modalities, of all ranks (Zhai et al. 2023).

Shapes: b rows of the first modality and n of the second on this rank, B and N of all ranks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from mmd2v.config.schema import SigLIPConfig
from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import all_gather_with_gradient
from mmd2v.distributed.ring import RankRing
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective
from mmd2v.objectives.pairs import Owners, Pair, same_number_on_ranks
from mmd2v_kernels import ring_siglip, siglip


class SigLIP(Objective):
    """Each pair is classified by itself, with a learned scale and bias; every caption of an image is a positive.

    The second modality's embeddings are gathered with gradient, or go round the ranks, and the first's stay where they
    are: of the B × N logits a rank computes b × N, each once.
    """

    def __init__(self, config: SigLIPConfig, student: Student, teachers: Mapping[str, Teacher], where: str) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        self.pair = Pair(config.between, student.inputs, where, "siglip")
        # Vectors and not scalars: ZeRO-3 shards parameters by rows.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(config.scale)), requires_grad=config.learned)
        self.bias = nn.Parameter(torch.full((1,), config.bias), requires_grad=config.learned)

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``siglip_loss``."""
        same_number_on_ranks(batch, "siglip", self.pair.inputs)
        owners = self.pair.owners(batch)
        first_bD, second_nD = (output.embedding[name] for name in self.pair.names)
        loss = self._loss(first_bD, second_nD, owners, self.log_scale.float().exp(), self.bias.float())
        return {"siglip_loss": loss}

    def _loss(
        self,
        first_bD: torch.Tensor,
        second_nD: torch.Tensor,
        owners: Owners,
        scale: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        mean_over = len(second_nD)
        if self.config.exchange == "ring":
            return ring_siglip(
                first_bD, second_nD, owners.local_n, scale, bias, mean_over, RankRing(), owners.own_weights
            )
        weights = None
        if owners.own_weights is not None and owners.all_weights is not None:
            weights = owners.own_weights[0], owners.all_weights[1]
        all_ND = all_gather_with_gradient(second_nD)
        return siglip(first_bD, all_ND, owners.of_all_N, owners.offset, scale, bias, mean_over, weights)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return scale and bias."""
        return {"siglip_scale": self.log_scale.detach().float().exp(), "siglip_bias": self.bias.detach().float()}
