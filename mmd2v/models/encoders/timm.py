"""The feature map of a timm backbone as image tokens."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
from torch import nn

from mmd2v.config.schema import TimmEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import Encoded, EncoderContext, FixedGrid, ModalityEncoder
from mmd2v.models.images import Normalize
from mmd2v.models.packed import Layout
from mmd2v.models.timm_backbone import backbone_features, create_backbone, feature_shape

logger = logging.getLogger(__name__)

_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm  # timm's own are subclasses


class TimmEncoder(ModalityEncoder):
    """One token a position of the backbone's feature map; the usual choice is a frozen pretrained backbone."""

    def __init__(self, config: TimmEncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        self.feature = config.feature
        self.image_size = context.image_size
        self.where = context.where
        self.normalize = Normalize(config.mean or context.image_mean, config.std or context.image_std)
        self.backbone = create_backbone(
            config.name,
            weights=config.weights if context.pretrained else None,
            kwargs=config.kwargs,
            # A backbone that is trained and names no weights is meant to start from scratch.
            published=context.pretrained and config.frozen,
            frozen=config.frozen,
            where=f"{context.where}.name",
        )
        if context.pretrained and not config.frozen and config.weights is None:
            logger.info("%s: '%s' is trained from scratch (it names no weights)", context.where, config.name)
        if config.feature != -1:
            self.backbone.prune_intermediate_layers([config.feature], prune_norm=True, prune_head=True)
        shape = feature_shape(self.backbone, context.image_size, config.feature, context.where)
        self.feature_width = shape.pooled_width if self.frozen else None
        """Width of the pooled feature of a whole frozen backbone; None where there is none."""
        self.feature_norm = nn.LayerNorm(shape.width) if config.feature_norm else nn.Identity()
        self.grid = FixedGrid(config, shape.width, shape.grid, context.width)
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
        return np.full(batch.image_count, self.grid.tokens)

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return [B · tokens, D] and, of a whole frozen backbone, its pooled feature.

        Raises UserError for a batch without images where the backbone learns from the statistics of its batch.
        """
        dtype = next(self.backbone.parameters()).dtype
        # A library's model is seldom able to run on no image: it gets a black one, whose features nobody sees.
        images, absent = batch.images, not batch.image_count
        if absent:
            self._check_without_images()
            images = batch.images.new_zeros(1, 3, self.image_size, self.image_size)
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            map_BCHW, pooled_BC = backbone_features(self.backbone, self.normalize(images, dtype), self.feature)
        if absent:
            map_BCHW, pooled_BC = map_BCHW[:0], None if pooled_BC is None else pooled_BC[:0]
        feature_BC = pooled_BC.float() if self.feature_width is not None and pooled_BC is not None else None
        return Encoded(self.grid(self.feature_norm(map_BCHW.flatten(2).transpose(1, 2))), feature_BC)

    def _check_without_images(self) -> None:
        if self.training and not self.frozen and any(isinstance(m, _BATCH_NORM) for m in self.backbone.modules()):
            raise UserError(
                f"{self.where}: a micro-batch of this rank holds no image, and the batch norms of a backbone that is "
                "trained would take the statistics of nothing; set frozen: true, or take a backbone without batch norm"
            )
