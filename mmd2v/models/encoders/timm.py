"""The feature map of a timm backbone as image tokens."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import nn

from mmd2v.config.schema import TimmEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.models.encoders.base import Encoded, EncoderContext, FixedGrid, ModalityEncoder
from mmd2v.models.images import Normalize
from mmd2v.models.timm_backbone import create_backbone, feature_map, output_grid, pooled_width


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
            frozen=config.frozen,
            where="model.encoders.image.name",
        )
        if config.feature != -1:
            self.backbone.prune_intermediate_layers([config.feature], prune_norm=True, prune_head=True)
        own_width, grid = output_grid(self.backbone, context.image_size, config.feature)
        self.feature_norm = nn.LayerNorm(own_width) if config.feature_norm else nn.Identity()
        self.grid = FixedGrid(config, own_width, grid, context.width)
        # The weights stay contiguous: DeepSpeed broadcasts parameters as bytes, which needs it. Channels-last images
        # alone make the convolutions take the fast path.
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

    @property
    def feature_width(self) -> int:
        """Width of the pooled feature of a frozen backbone."""
        return pooled_width(self.backbone)

    def forward(self, batch: Batch) -> Encoded:
        """Return [B · tokens, D] and, of a whole frozen backbone, its pooled feature."""
        dtype = next(self.backbone.parameters()).dtype
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            map_BCHW = feature_map(self.backbone, self.normalize(batch.images, dtype), self.feature)
            whole = self.frozen and self.feature == -1 and map_BCHW.shape[1] == self.feature_width
            pooled_BC = self.backbone.forward_head(map_BCHW, pre_logits=True).float() if whole else None
        return Encoded(self.grid(self.feature_norm(map_BCHW.flatten(2).transpose(1, 2))), pooled_BC)
