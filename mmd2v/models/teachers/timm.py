"""Any timm image model as a teacher."""

from __future__ import annotations

import torch

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.images import Normalize
from mmd2v.models.teachers.base import Targets, Teacher
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
        pooled_width = feature_shape(self.model, size, -1, where).pooled_width
        if pooled_width is None:
            raise UserError(f"{where}: '{model_name}' gives no pooled feature [B, D]")
        self.width = pooled_width

    def freeze(self, device: torch.device) -> Teacher:
        """Freeze; convolutions run faster on channels-last weights."""
        return super().freeze(device).to(memory_format=torch.channels_last)

    def encode(self, batch: Batch) -> Targets:
        """Return pooled feature and the positions of the feature map as tokens."""
        map_BCHW, pooled_BC = backbone_features(self.model, self.normalize(batch.images, self.dtype), -1)
        assert pooled_BC is not None  # feature -1 always has one
        return Targets(pooled_BC, map_BCHW.flatten(2).transpose(1, 2))
