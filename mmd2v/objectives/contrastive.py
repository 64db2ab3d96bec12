"""Contrastive loss between two modalities with negatives from all ranks, of the final embedding and of chosen layers.

Shapes: b rows of the first modality and n of the second on this rank, B and N of all ranks, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import ContrastiveConfig
from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import all_gather_with_gradient
from mmd2v.distributed.ring import RankRing
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput, Wanted
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective
from mmd2v.objectives.heads import regression_head
from mmd2v.objectives.pairs import Owners, Pair, same_number_on_ranks
from mmd2v.objectives.temperature import log_scales, scales
from mmd2v_kernels import ContrastiveWeights, contrastive, ring_contrastive


class Contrastive(Objective):
    """Symmetric InfoNCE with learned temperatures (Radford et al. 2021), at one level or several.

    A level is the final embedding or the CLS after a layer. Each has a temperature of its own, since the sharpness
    that fits the last layer is wrong for an early one; and each layer has a head of its own, one for both modalities
    where the final projection is shared and one a modality where it is not.
    """

    def __init__(
        self, config: ContrastiveConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        self.pair = Pair(config.between, student.inputs, where, "contrastive")
        _check_layers(config, student, self.pair, where)
        self.shared_heads = student.config.projection.shared
        dim = config.dim or student.embedding_width
        owners = ("shared",) if self.shared_heads else self.pair.names
        self.heads = nn.ModuleDict(
            {
                f"layer{i}": nn.ModuleDict(
                    {owner: regression_head("norm_linear", student.config.width, dim, where) for owner in owners}
                )
                for i in config.layers
            }
        )
        self.levels = ([None] if config.final else []) + list(config.layers)
        self.log_scale = log_scales(config.temperature, config.learned, len(self.levels))

    @property
    def wanted(self) -> Wanted:
        """See `Objective.wanted`."""
        return Wanted(layers=frozenset(self.config.layers))

    def scale(self) -> torch.Tensor:
        """Return the inverse temperature of each level, within [1, 100]."""
        return scales(self.log_scale)

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``contrastive_loss`` and ``contrastive_loss/layerI``."""
        same_number_on_ranks(batch, "contrastive", self.pair.inputs)
        owners = self.pair.owners(batch)
        losses = {}
        for level, scale in zip(self.levels, self.scale().split(1), strict=True):
            rows = [self._embedding(output, level, name) for name in self.pair.names]
            losses[_named("contrastive_loss", level)] = self._loss(*rows, owners, scale)
        return losses

    def _loss(
        self, first_bD: torch.Tensor, second_nD: torch.Tensor, owners: Owners, scale: torch.Tensor
    ) -> torch.Tensor:
        smoothing = self.config.label_smoothing
        if self.config.exchange == "ring":
            return ring_contrastive(
                first_bD, second_nD, owners.local_n, scale, RankRing(), smoothing, owners.own_weights
            )
        return contrastive(
            first_bD,
            second_nD,
            all_gather_with_gradient(first_bD),
            all_gather_with_gradient(second_nD),
            owners.of_own_n,
            owners.of_all_N,
            owners.offset,
            scale,
            smoothing,
            _weights(owners),
        )

    def _embedding(self, output: StudentOutput, level: int | None, modality: str) -> torch.Tensor:
        if level is None:
            return output.embedding[modality]
        head = self.heads[f"layer{level}"]["shared" if self.shared_heads else modality]
        return F.normalize(head(output.layer_cls[level][modality]).float(), dim=-1)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return the temperatures' inverses."""
        values = self.scale().detach().split(1)
        return {_named("contrastive_scale", level): v for level, v in zip(self.levels, values, strict=True)}


def _named(name: str, level: int | None) -> str:
    return name if level is None else f"{name}/layer{level}"


def _check_layers(config: ContrastiveConfig, student: Student, pair: Pair, where: str) -> None:
    for i in config.layers:
        if i >= len(student.layers):
            raise UserError(
                f"{where}.layers: found {i}, expected an index below {len(student.layers)}, the number of layers"
            )
        for name in pair.names:
            if name not in student.layers[i].modalities:
                raise UserError(f"{where}.layers: found {i}, which '{name}' does not pass; expected a layer of both")
    for name in pair.names if config.layers else ():
        pooling = student.config.pooling.get(name, "cls")
        if pooling != "cls":
            raise UserError(f"{where}.layers: needs the CLS of '{name}', but model.pooling.{name} is {pooling}")


def _weights(owners: Owners) -> ContrastiveWeights | None:
    """A damaged sample is neither query nor negative, on any rank; a caption counts as its image does."""
    if owners.own_weights is None or owners.all_weights is None:
        return None
    return ContrastiveWeights(*owners.own_weights, *owners.all_weights)
