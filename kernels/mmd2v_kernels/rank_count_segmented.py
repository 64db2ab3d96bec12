"""CPU path of `rank_count`: fp32 products in blocks, and the pairs too close to call exactly.

Positives need no mask: none scores above the best of them, so none is ever surely above, and those among the close
pairs are taken out.

Shapes: N queries (rows), M bank rows (columns), D width, P positive pairs, n and m one block of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mmd2v_kernels import cpu_scans
from mmd2v_kernels.exact_pairs_cpu import exact_pairs, in_threads
from mmd2v_kernels.fp32_products import BLOCK, BLOCK_COLUMNS, PIECE, Close, error_of_fp32, find_above, product
from mmd2v_kernels.rank_sides import Best, Side
from mmd2v_kernels.retrieval_order import check_finite

__all__ = ["count_sides"]

_CLOSE_SHARE = 1 / 64
"""Of a block's pairs: with more of them close, a float64 product of the block costs less than their exact scores."""
_FEW_CLOSE = 4096
"""So many are scored exactly in any block."""


def count_sides(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    pairs_2P: torch.Tensor,
    first: int,
    last: int,
    in_float64: Callable[[Side, Side, range, range], None],
    row_best: Best | None = None,
) -> tuple[Side, Side] | None:
    """Return both sides with what query rows ``first`` to ``last`` contribute; None: their range is beyond fp32's.

    Raises ValueError for values that are not finite.
    ``in_float64(row, column, rows, columns)`` counts a block that has too many close pairs.
    """
    error_N = error_of_fp32(queries_ND, bank_MD)
    if error_N is None:
        check_finite(queries=queries_ND, bank=bank_MD)
        return None
    score_P = exact_pairs(queries_ND, bank_MD, pairs_2P[0], pairs_2P[1])
    row, column = Side.both(pairs_2P, score_P, len(queries_ND), len(bank_MD), row_best)
    positives = (pairs_2P[0] * len(bank_MD) + pairs_2P[1]).unique().numpy()  # sorted
    widest = min(BLOCK_COLUMNS, len(bank_MD))
    block_rows = max(PIECE, BLOCK // widest // PIECE * PIECE)
    scores = torch.empty(min(block_rows, last - first) * widest)
    for left in range(0, len(bank_MD), BLOCK_COLUMNS):
        columns = range(left, min(left + BLOCK_COLUMNS, len(bank_MD)))
        bank_mD = bank_MD[columns.start : columns.stop].float()
        for top in range(first, last, block_rows):
            rows = range(top, min(top + block_rows, last))
            scores_nm = product(queries_ND[rows.start : rows.stop], bank_mD, scores).numpy()
            error_n = error_N[rows.start : rows.stop]
            row_bounds = _bounds(row.threshold[rows.start : rows.stop], error_n)
            column_bounds = _bounds(column.threshold[columns.start : columns.stop], error_n.max())

            def look(
                piece: int, scores_nm=scores_nm, row_bounds=row_bounds, column_bounds=column_bounds, rows=rows
            ) -> tuple[int, Close, Close] | None:
                chosen = slice(piece, piece + PIECE)
                own_bounds = [bound[chosen] for bound in row_bounds]
                both = _both_sides(scores_nm[chosen], own_bounds, column_bounds)
                return None if both is None else (piece + rows.start, *both)

            found = [one for one in in_threads(look, range(0, len(rows), PIECE)) if one is not None]
            close = sum(len(of_row.rows) + len(of_column.rows) for _, of_row, of_column in found)
            complete = len(found) == len(range(0, len(rows), PIECE))
            if not complete or close > max(_FEW_CLOSE, len(rows) * len(columns) * _CLOSE_SHARE):
                in_float64(row, column, rows, columns)
                continue
            for start, of_row, of_column in found:
                row.counts[0, start : start + len(of_row.row_r)] += torch.from_numpy(of_row.row_r)
                column.counts[0, columns.start : columns.stop] += torch.from_numpy(of_column.column_m)
            for side, which in ((row, 1), (column, 2)):
                r = np.concatenate([one[which].rows + one[0] for one in found])
                c = np.concatenate([one[which].columns + columns.start for one in found])
                key = r * len(bank_MD) + c
                at = np.searchsorted(positives, key)
                other = np.ones(len(key), dtype=bool)
                if len(positives):
                    other = positives[np.minimum(at, len(positives) - 1)] != key
                r, c = torch.from_numpy(r[other]), torch.from_numpy(c[other])
                items, others = (r, c) if side is row else (c, r)
                side.settle(items, others, exact_pairs(queries_ND, bank_MD, r, c))
    return row, column


def _bounds(threshold: torch.Tensor, error: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the threshold less and more the error in fp32, rounded away from it."""
    low = (threshold - error).numpy().astype(np.float32)
    high = (threshold + error).numpy().astype(np.float32)
    below = np.nextafter(low, np.float32(-np.inf))
    below[np.isinf(low)] = np.inf  # no positive: nothing counts
    return below, np.nextafter(high, np.float32(np.inf))


def _both_sides(
    scores_rm: np.ndarray, row_bounds: Sequence[np.ndarray], column_bounds: Sequence[np.ndarray]
) -> tuple[Close, Close] | None:
    """Compare a piece with the bounds of its rows and of its columns; None: too many are close."""
    if not cpu_scans.available():
        of_row = find_above(scores_rm, *(bound[:, None] for bound in row_bounds))
        return of_row, find_above(scores_rm, *(bound[None] for bound in column_bounds))
    most = max(_FEW_CLOSE, int(scores_rm.size * _CLOSE_SHARE)) + scores_rm.shape[1]
    found = cpu_scans.find_above(scores_rm, row_bounds, column_bounds, most)
    if found is None:
        return None
    counts = found.row_r.astype(np.int64), found.column_m.astype(np.int64)
    of_row, of_column = (Close(*counts, *(index.astype(np.int64) for index in found.close_to(side))) for side in (0, 1))
    return of_row, of_column
