"""What every modality encoder shares: bridge to the model's width, CLS, positions, norm, dropout.

Shapes: R rows of all sequences of the modality, S sequences, P tokens a sequence, C the encoder's own width,
D the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mmd2v.config.schema import EncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.models.positions import sincos_2d


@dataclass(frozen=True)
class EncoderContext:
    """What an encoder must know of the rest of the run."""

    width: int
    """D"""
    image_size: int
    """pixels"""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    vocab_size: int | None
    max_length: int | None
    pretrained: bool
    """False: build the modules only, because all weights are about to be loaded from a checkpoint."""


class ModalityEncoder(nn.Module):
    """Base class. Subclasses implement :meth:`lengths` and :meth:`forward`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.frozen = config.frozen

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return int64 [S], tokens of each sequence of the batch, computed on the host."""
        raise NotImplementedError  # an abstract method

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the rows that enter the layers, [R, D]."""
        raise NotImplementedError  # an abstract method


class FixedGrid(nn.Module):
    """From P tokens of width C a sequence to rows of width D: bridge, positions, CLS, norm, dropout."""

    def __init__(self, config: EncoderConfig, own_width: int, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        tokens = grid[0] * grid[1]
        self.bridge = nn.Linear(own_width, width) if own_width != width else nn.Identity()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.cls else None
        self.positions: torch.Tensor | None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.zeros(1, tokens + int(config.cls), width))
        elif config.positions == "sincos":
            table = sincos_2d(grid, width)
            if config.cls:
                table = torch.cat([torch.zeros(1, width), table])
            self.register_buffer("positions", table[None], persistent=False)
        else:
            self.positions = None
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.tokens = tokens + int(config.cls)

    def forward(self, x_SPC: torch.Tensor) -> torch.Tensor:
        """Return [S · tokens, D]."""
        x_SPD = self.bridge(x_SPC)
        if self.cls_token is not None:
            x_SPD = torch.cat([self.cls_token.expand(x_SPD.shape[0], -1, -1).to(x_SPD.dtype), x_SPD], dim=1)
        if self.positions is not None:
            x_SPD = x_SPD + self.positions
        return self.dropout(self.norm(x_SPD)).flatten(0, 1)
