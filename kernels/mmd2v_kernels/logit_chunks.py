"""Logits of all pairs of rows and columns, a few rows at a time: what the chunked contrastive losses share.

Shapes: N rows, M columns, n rows of a chunk, D width.
"""

from __future__ import annotations

import torch

__all__ = ["CHUNK", "LogitChunks"]

CHUNK = 1 << 22
"""Logits in memory at once, 16 MB in fp32, and the same again for what is made of them."""
_FEWEST_ROWS = 128  # matrix products of fewer rows are slow


class LogitChunks:
    """Products scale · row · column in chunks of about ``chunk``, in memory that is used again."""

    def __init__(self, row_ND: torch.Tensor, column_MD: torch.Tensor, scale: torch.Tensor, chunk: int) -> None:
        self._row_ND, self._column_DM, self._scale = row_ND, column_MD.t(), scale
        self._size = min(len(row_ND), max(_FEWEST_ROWS, chunk // len(column_MD)))
        self._logits, self._other = row_ND.new_empty(2, self._size, len(column_MD))

    def rows(self) -> list[slice]:
        """Return the rows of each chunk."""
        return [slice(top, min(top + self._size, len(self._row_ND))) for top in range(0, len(self._row_ND), self._size)]

    def logits(self, rows: slice) -> torch.Tensor:
        """Return [n, M], until the next call."""
        out = self._logits[: rows.stop - rows.start]
        return torch.mm(self._scale * self._row_ND[rows], self._column_DM, out=out)

    def other(self, rows: slice) -> torch.Tensor:
        """Return memory of the same shape."""
        return self._other[: rows.stop - rows.start]
