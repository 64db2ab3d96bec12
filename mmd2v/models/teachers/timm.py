"""Any timm image model as a teacher."""

from __future__ import annotations

import torch

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.models.images import Normalize
from mmd2v.models.teachers.base import Targets, Teacher
from mmd2v.models.timm_backbone import create_backbone, output_grid, pooled_width, published_normalization


class TimmTeacher(Teacher):
    """``timm:NAME[@WEIGHTS]``: WEIGHTS is a safetensors file or an export folder; without it timm downloads its own.

    The CLS is the feature that timm would classify (a ViT's CLS or pooled tokens, a CNN's pooled map).
    """

    def __init__(self, name: str, config: TeacherConfig, image_size: int, where: str) -> None:
        super().__init__(config)
        model_name, _, weights = name.partition("@")
        self.model = create_backbone(
            model_name, weights=weights or None, kwargs=config.kwargs, published=True, frozen=True, where=where
        )
        mean, std = published_normalization(self.model)
        self.normalize = Normalize(config.mean or mean, config.std or std, config.image_size)
        self.width = pooled_width(self.model)
        # A size the model cannot take is found here, not in the first step.
        output_grid(self.model, config.image_size or image_size, -1)

    def freeze(self, device: torch.device) -> Teacher:
        """Freeze; convolutions run faster on channels-last weights."""
        return super().freeze(device).to(memory_format=torch.channels_last)

    def encode(self, batch: Batch) -> Targets:
        """Return pooled feature and feature map or tokens."""
        features = self.model.forward_features(self.normalize(batch.images, self.dtype))
        tokens_BTD = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        return Targets(self.model.forward_head(features, pre_logits=True), tokens_BTD)
