"""The convolutions that predict hidden tokens (data2vec 2.0's decoder).

Shapes: C clones, L tokens, D width, E channels of the decoder, N chosen places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import DecoderConfig
from mmd2v.errors import UserError


class ConvDecoder(nn.Module):
    """Convolutions, each with LayerNorm (no weights), GELU and residual, then linear maps back to the width.

    ``grid`` is the form of the tokens: rows and columns, or None for a line. ``config`` has every field given.
    """

    def __init__(self, config: DecoderConfig, width: int, grid: tuple[int, int] | None, where: str) -> None:
        super().__init__()
        dim, kernel, groups = config.dim, config.kernel, config.groups
        assert dim and kernel and groups and config.layers and config.projection_layers  # `DecoderConfig.filled`
        if kernel % 2 == 0:
            raise UserError(f"{where}.kernel: found {kernel}, expected an odd number")
        for name, channels in (("dim", dim), ("the model's width", width)):
            if channels % groups:
                raise UserError(f"{where}.groups: {name} {channels} is not divisible by {groups} groups")
        self.grid = grid
        self.residual = bool(config.residual)
        self.dropout = nn.Dropout(config.input_dropout or 0.0)
        convolution = nn.Conv1d if grid is None else nn.Conv2d
        self.convolutions = nn.ModuleList(
            convolution(dim if i else width, dim, kernel, padding=kernel // 2, groups=groups)
            for i in range(config.layers)
        )
        maps: list[nn.Module] = []
        own = dim
        for i in range(config.projection_layers - 1):
            hidden = round(dim * config.projection_ratio) if i == 0 else own
            maps += [nn.Linear(own, hidden), nn.GELU()]
            own = hidden
        self.projection = nn.Sequential(*maps, nn.Linear(own, width))

    def forward(
        self, x_CLD: torch.Tensor, places_N: torch.Tensor, is_token_CL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the predictions [N, D] at some places of the flattened rectangle [C · L].

        ``is_token_CL`` (bool) keeps what fills shorter sequences 0 before every convolution, as the space beyond the
        end of a longest one is.
        """
        x_CLD = self.dropout(x_CLD)
        shape = self.grid or x_CLD.shape[1:2]
        # Channels last in memory: the norms need no copy, nor do convolutions over a grid.
        x = x_CLD.unflatten(1, shape).movedim(-1, 1)
        real = None if is_token_CL is None else is_token_CL.unflatten(1, shape)[:, None]
        if real is not None:
            x = x * real
        for convolution in self.convolutions:
            y = convolution(x).movedim(1, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).movedim(-1, 1)
            x = x + y if self.residual and x.shape == y.shape else y
            if real is not None:
                x = x * real
        return self.projection(x.movedim(1, -1).flatten(0, -2).index_select(0, places_N))
