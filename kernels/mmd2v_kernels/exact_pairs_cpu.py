"""Exact scores of pairs on the CPU: pieces that stay in a core's cache, as many at once as torch has threads.

Shapes: N queries, M bank rows, D width, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

__all__ = ["exact_pairs", "in_threads"]

_PAIRS = 128
"""Pairs scored at once: 768 kB of float64 at width 768."""

T = TypeVar("T")
R = TypeVar("R")


def in_threads(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``call`` of each item, by as many threads as torch uses. For calls that release the interpreter's lock."""
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))


def exact_pairs(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return `retrieval_order.exact_dot` of queries ``rows`` [P] with bank rows ``columns`` [P], to the last bit."""
    scores = np.empty(len(rows))
    left, right = _numpy(queries_ND), _numpy(bank_MD)
    row, column = rows.numpy(), columns.numpy()

    def score(start: int) -> None:
        chunk = slice(start, start + _PAIRS)
        sums = _gather(left, row[chunk]).astype(np.float64)
        sums *= _gather(right, column[chunk])
        width = sums.shape[1]
        while width > 1:
            half = (width + 1) // 2
            sums[:, : width - half] += sums[:, half:width]
            width = half
        scores[chunk] = sums[:, 0]

    def several(start: int) -> None:
        for first in range(start, min(start + 16 * _PAIRS, len(row)), _PAIRS):
            score(first)

    in_threads(several, range(0, len(row), 16 * _PAIRS))
    return torch.from_numpy(scores)


def _numpy(matrix: torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return a view, of the dtype that numpy lacks the tensor itself."""
    return matrix.detach() if matrix.dtype == torch.bfloat16 else matrix.detach().numpy()


def _gather(matrix: np.ndarray | torch.Tensor, index: np.ndarray) -> np.ndarray:
    if isinstance(matrix, torch.Tensor):
        return matrix[torch.from_numpy(index)].float().numpy()
    return matrix[index]
