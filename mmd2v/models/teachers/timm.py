"""Any timm image model as a teacher."""

from __future__ import annotations

import torch
from torch import nn

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.images import Normalize
from mmd2v.models.teachers.base import Needs, Targets, Teacher
from mmd2v.models.teachers.results import ResultHooks
from mmd2v.models.timm_backbone import (
    backbone_features,
    create_backbone,
    feature_shape,
    published_normalization,
    published_size,
)


class TimmTeacher(Teacher):
    """``timm:NAME[@WEIGHTS]``: WEIGHTS is a safetensors file or an export folder; without it timm downloads its own.

    The CLS is the feature that timm would classify (a ViT's CLS or pooled tokens, a CNN's pooled map).
    """

    def __init__(self, name: str, config: TeacherConfig, where: str) -> None:
        super().__init__(config)
        model_name, _, weights = name.partition("@")
        self.model = create_backbone(
            model_name, weights=weights or None, kwargs=config.kwargs, published=True, frozen=True, where=where
        )
        mean, std = published_normalization(self.model)
        size = config.image_size or published_size(self.model, config.kwargs)
        self.normalize = Normalize(config.mean or mean, config.std or std, size)
        # A size the model cannot take is found here, not in the first step.
        shape = feature_shape(self.model, size, -1, where)
        pooled_width, self._token_width = shape.pooled_width, shape.width
        if pooled_width is None:
            raise UserError(f"{where}: '{model_name}' gives no pooled feature [B, D]")
        self.width = pooled_width

        self.results: ResultHooks | None = None

    @property
    def token_width(self) -> int:
        """Width of the feature map; a CNN's pooled feature may be wider."""
        return self._token_width

    def can_give(self, name: str) -> bool:
        """Tell whether the layer results can be caught: ViTs whose blocks end in an MLP."""
        return name == "layer_results" and bool(self._mlps())

    def _mlps(self) -> list[nn.Module]:
        blocks = getattr(self.model, "blocks", None)
        mlps = (
            [getattr(block, "mlp", None) for block in blocks]
            if isinstance(blocks, nn.Sequential | nn.ModuleList)
            else []
        )
        return [mlp for mlp in mlps if isinstance(mlp, nn.Module)] if None not in mlps else []

    def prepare(self, needs: Needs, where: str) -> None:
        """See `Teacher.prepare`."""
        super().prepare(needs, where)
        if needs.layer_results and self.results is None:
            self.results = ResultHooks(self._mlps())

    def freeze(self, device: torch.device) -> Teacher:
        """Freeze; convolutions run faster on channels-last weights."""
        return super().freeze(device).to(memory_format=torch.channels_last)

    def encode(self, batch: Batch) -> Targets:
        """Return pooled feature and the positions of the feature map as tokens."""
        map_BCHW, pooled_BC = backbone_features(self.model, self.normalize(batch.images, self.dtype), -1)
        assert pooled_BC is not None  # feature -1 always has one
        results = [] if self.results is None else self.results.take()
        return Targets(pooled_BC, map_BCHW.flatten(2).transpose(1, 2), results)
