"""What every modality encoder shares: bridge to the model's width, CLS, positions, norm, dropout.

Shapes: R rows of all sequences of the modality, S sequences, P tokens a sequence, C the encoder's own width,
D the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mmd2v.config.schema import EncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError, nearest
from mmd2v.models.packed import Layout
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
    where: str = "model.encoders"
    """Place in the config, for error messages."""
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name in ``data.arrays`` → shape of one sample's."""


class Encoded(NamedTuple):
    """Output of a modality encoder."""

    rows: torch.Tensor
    """[R, D], what enters the layers."""
    feature: torch.Tensor | None = None
    """[S, C], the pooled feature of a frozen backbone; None where there is none."""


class ModalityEncoder(nn.Module):
    """Base class. Subclasses implement :meth:`lengths` and :meth:`forward`.

    Both must take a batch that lacks what the encoder sees, and ``forward`` then call the same modules as ever with no
    rows, as every rank must under ZeRO. Text encoders also set ``vocab_size`` (rows of the embedding table) and
    ``max_length`` (positions, None: any).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.frozen = config.frozen

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return int64 [S], tokens of each sequence of the batch, computed on the host."""
        raise NotImplementedError  # an abstract method

    def keys(self, batch: Batch) -> np.ndarray | None:
        """Return int64 [S], the real tokens of each sequence where `lengths` count padding too; else None."""
        return None

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return the rows that enter the layers; ``layout`` knows them under ``modality``."""
        raise NotImplementedError  # an abstract method


class ArrayEncoder(ModalityEncoder):
    """Base of encoders of an array that lies beside the image (``data.arrays``): the same tokens for every sample.

    Subclasses set ``grid`` and implement :meth:`encode`; ``shape`` is that of one sample's array.
    """

    grid: FixedGrid

    def __init__(self, config: EncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        self.input = config.input
        if config.input not in context.arrays:
            raise UserError(
                f"{context.where}.input: found '{config.input}', expected a name in data.arrays "
                f"({', '.join(context.arrays) or 'which is empty'}).{nearest(config.input, context.arrays)}"
            )
        self.shape = tuple(context.arrays[config.input])

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the same number of tokens for every sample."""
        return np.full(len(batch.arrays[self.input]), self.grid.tokens)

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return [B · tokens, D]."""
        dtype = next(self.parameters()).dtype
        return Encoded(self.encode(batch.arrays[self.input].to(dtype)))

    def encode(self, x_BX: torch.Tensor) -> torch.Tensor:
        """Return the rows [B · tokens, D] of a batch of arrays [B, …], as ``grid`` makes them."""
        raise NotImplementedError  # an abstract method


class FixedGrid(nn.Module):
    """From P tokens of width C a sequence to rows of width D: bridge, positions, token drop, CLS, norm, dropout."""

    def __init__(self, config: EncoderConfig, own_width: int, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        tokens = grid[0] * grid[1]
        self.kept = max(1, round(tokens * (1 - config.token_drop)))
        self.all = tokens
        self.shape = grid
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
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    @property
    def tokens(self) -> int:
        """Tokens of a sequence in the present mode, the CLS included."""
        return (self.kept if self.training else self.all) + int(self.cls_token is not None)

    def forward(self, x_SPC: torch.Tensor) -> torch.Tensor:
        """Return [S · tokens, D]."""
        sequences = x_SPC.shape[0]
        cls_positions, grid_positions = None, None
        if self.positions is not None:
            # A fixed table stays fp32 where an engine has cast the parameters, and norms take one dtype.
            dtype = next(self.parameters(), self.positions).dtype
            positions_SPD = self.positions.to(dtype).expand(sequences, -1, -1)
            if self.cls_token is not None:
                cls_positions, grid_positions = positions_SPD[:, :1], positions_SPD[:, 1:]
            else:
                grid_positions = positions_SPD
        if self.training and self.kept < self.all:
            # Tokens are chosen before the bridge: what is left out costs nothing after this line.
            chosen_SP = torch.rand(sequences, self.all, device=x_SPC.device).argsort(dim=1)[:, : self.kept]
            x_SPC = torch.take_along_dim(x_SPC, chosen_SP[..., None], dim=1)
            if grid_positions is not None:
                grid_positions = torch.take_along_dim(grid_positions, chosen_SP[..., None], dim=1)
        x_SPD = self.bridge(x_SPC)
        if grid_positions is not None:
            x_SPD = x_SPD + grid_positions
        if self.cls_token is not None:
            cls_S1D = self.cls_token.expand(sequences, -1, -1)
            cls_S1D = cls_S1D if cls_positions is None else cls_S1D + cls_positions
            x_SPD = torch.cat([cls_S1D.to(x_SPD.dtype), x_SPD], dim=1)
        return self.dropout(self.norm(x_SPD)).flatten(0, 1)
