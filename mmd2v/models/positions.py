"""Fixed position embeddings."""

from __future__ import annotations

import torch


def sincos_2d(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Return the 2-D sine-cosine table of MAE and data2vec 2.0, [height · width of the grid, D], rows first.

    The first half of the channels encodes the column, the second half the row. Raises ValueError when ``width`` is
    not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"width: found {width}, 2-D sine-cosine positions need a multiple of 4")
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    return torch.cat([_sincos_1d(columns, width // 2), _sincos_1d(rows, width // 2)], dim=1).float()


def _sincos_1d(positions: torch.Tensor, width: int) -> torch.Tensor:
    frequency = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = positions.reshape(-1, 1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
