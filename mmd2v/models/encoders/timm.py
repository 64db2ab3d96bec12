"""The feature map of a timm backbone as image tokens."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from mmd2v.config.schema import TimmEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.models.encoders.base import EncoderContext, FixedGrid, ModalityEncoder
from mmd2v.models.images import Normalize
from mmd2v.models.timm_backbone import create_backbone, feature_map, output_grid


class TimmEncoder(ModalityEncoder):
    """One token a position of the backbone's feature map; the usual choice is a frozen pretrained backbone."""

    def __init__(self, config: TimmEncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        self.feature = config.feature
        self.normalize = Normalize(config.mean or context.image_mean, config.std or context.image_std)
        self.backbone = create_backbone(
            config.name,
            weights=config.weights if context.pretrained else None,
            kwargs=config.kwargs,
            # A backbone that is trained from scratch has no weights to fetch.
            published=context.pretrained and config.frozen,
            where="model.encoders.image.name",
        )
        if config.feature != -1:
            self.backbone.prune_intermediate_layers([config.feature], prune_norm=True, prune_head=True)
        own_width, grid = output_grid(self.backbone, context.image_size, config.feature)
        self.grid = FixedGrid(config, own_width, grid, context.width)
        self.backbone.to(memory_format=torch.channels_last)
        if self.frozen:
            self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TimmEncoder:
        """Set the mode; a frozen backbone stays in eval mode (its batch statistics must not move)."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the same number of tokens for every image."""
        return np.full(len(batch), self.grid.tokens)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return [B · tokens, D]."""
        dtype = next(self.backbone.parameters()).dtype
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            map_BCHW = feature_map(self.backbone, self.normalize(batch.images, dtype), self.feature)
        return self.grid(map_BCHW.flatten(2).transpose(1, 2))
