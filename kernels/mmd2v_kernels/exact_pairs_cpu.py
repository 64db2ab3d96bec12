"""Exact scores of pairs on the CPU: pieces that stay in a core's cache, as many at once as torch has threads.

Shapes: N queries, M bank rows, D width, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from mmd2v_kernels import cpu_scans

__all__ = ["exact_pairs", "in_threads"]

_PAIRS, _IN_CACHE = 1024, 64
"""Pairs scored at once, of which so many are multiplied at a time: 400 kB of float64 at width 768."""
_AT_ONCE = 1 << 14
"""Pairs of one call of the compiled loop."""
_NARROW = 96
"""Columns that are left when the second half of the folds begins."""

T = TypeVar("T")
R = TypeVar("R")


def in_threads(call: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> list[R]:
    """Return ``call`` of each item, by as many threads as torch uses. For calls that release the interpreter's lock."""
    items = list(items)
    threads = min(threads or torch.get_num_threads(), len(items))
    if threads <= 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))


def exact_pairs(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return `retrieval_order.exact_dot` of queries ``rows`` [P] with bank rows ``columns`` [P], to the last bit."""
    if cpu_scans.multipliable(queries_ND, bank_MD):
        parts = in_threads(
            lambda pair: cpu_scans.exact_pairs(queries_ND.detach().numpy(), bank_MD.detach().numpy(), *pair),
            [
                (rows[i : i + _AT_ONCE].numpy(), columns[i : i + _AT_ONCE].numpy())
                for i in range(0, len(rows), _AT_ONCE)
            ],
        )
        return torch.from_numpy(np.concatenate([np.empty(0), *parts]))
    scores = np.empty(len(rows))
    left, right = _numpy(queries_ND), _numpy(bank_MD)
    row, column = rows.numpy(), columns.numpy()
    width = queries_ND.shape[1]

    def score(start: int) -> None:
        stop = min(start + _PAIRS, len(row))
        sums = np.empty((min(_IN_CACHE, stop - start), width))
        narrow = np.empty((_narrow_width(width), stop - start))
        for first in range(start, stop, _IN_CACHE):
            chunk = slice(first, min(first + _IN_CACHE, stop))
            own = sums[: chunk.stop - first]
            np.copyto(own, _gather(left, row[chunk]))
            own *= _gather(right, column[chunk])
            # Rows of few columns are slow to add: from here on a row is all pairs of one column.
            narrow[:, first - start : chunk.stop - start] = _fold(own.T, _NARROW)
        scores[start:stop] = _fold(narrow, 1)[0]

    in_threads(score, range(0, len(row), _PAIRS))
    return torch.from_numpy(scores)


def _narrow_width(width: int) -> int:
    """Return how many columns `_fold` leaves of ``width``."""
    while width > _NARROW:
        width = (width + 1) // 2
    return width


def _fold(sums_DP: np.ndarray, until: int) -> np.ndarray:
    """Fold the upper half of D onto the lower one, in place, until at most ``until`` are left; return those."""
    width = len(sums_DP)
    while width > until:
        half = (width + 1) // 2
        sums_DP[: width - half] += sums_DP[half:width]
        width = half
    return sums_DP[:width]


def _numpy(matrix: torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return a view, of the dtype that numpy lacks the tensor itself."""
    return matrix.detach() if matrix.dtype == torch.bfloat16 else matrix.detach().numpy()


def _gather(matrix: np.ndarray | torch.Tensor, index: np.ndarray) -> np.ndarray:
    if isinstance(matrix, torch.Tensor):
        return matrix[torch.from_numpy(index)].float().numpy()
    return np.take(matrix, index, axis=0)
