"""Patch embedding (ViT, Dosovitskiy et al. 2020)."""

from __future__ import annotations

import numpy as np
from torch import nn

from mmd2v.config.schema import PatchEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import Encoded, EncoderContext, FixedGrid, ModalityEncoder
from mmd2v.models.images import Normalize
from mmd2v.models.packed import Layout


class PatchEncoder(ModalityEncoder):
    """Non-overlapping patches through one strided convolution."""

    def __init__(self, config: PatchEncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        side, rest = divmod(context.image_size, config.patch_size)
        if rest:
            raise UserError(
                f"data.image.size: found {context.image_size}, expected a multiple of patch_size {config.patch_size}"
            )
        self.image_size = context.image_size
        self.normalize = Normalize(context.image_mean, context.image_std)
        self.proj = nn.Conv2d(3, context.width, config.patch_size, config.patch_size)
        self.grid = FixedGrid(config, context.width, (side, side), context.width)
        if config.frozen:
            self.requires_grad_(False)

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the same number of tokens for every image."""
        return np.full(batch.image_count, self.grid.tokens)

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return [B · tokens, D]."""
        x_BDhw = self.proj(self.normalize(batch.square_images(self.image_size), self.proj.weight.dtype))
        return Encoded(self.grid(x_BDhw.flatten(2).transpose(1, 2)))
