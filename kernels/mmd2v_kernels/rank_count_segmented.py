"""CPU path of `rank_count`: fast products of strips and pieces, and the pairs too close to call exactly.

Positives need no mask: none scores above the best of them, so none is ever surely above, and those among the close
pairs are taken out.

Shapes: N queries (rows), M bank rows (columns), D width, P positive pairs, r rows of a strip, m columns of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmd2v_kernels import cpu_scans
from mmd2v_kernels.exact_pairs_cpu import exact_pairs
from mmd2v_kernels.fast_products import AT_ONCE, Products, choose_products, sweep
from mmd2v_kernels.numpy_scans import Close, find_above
from mmd2v_kernels.rank_sides import Best, Side
from mmd2v_kernels.retrieval_order import check_finite

__all__ = ["count_sides"]

_CLOSE_SHARE = 1 / 64
"""Of a piece's pairs: with more of them close, its float64 product costs less than their exact scores."""
_FEW_CLOSE = 4096
"""So many are scored exactly in any piece."""
_CLEAR = 0.75
"""Share of the first pieces that must not have more for coarse products to go on."""


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
    ``in_float64(row, column, rows, columns)`` counts a piece that has too many close pairs.
    """
    if last - first < len(queries_ND):  # no product here sees the others, but all ranks are to say the same
        check_finite(queries=queries_ND, bank=bank_MD)
    score_P = exact_pairs(queries_ND, bank_MD, pairs_2P[0], pairs_2P[1])
    row, column = Side.both(pairs_2P, score_P, len(queries_ND), len(bank_MD), row_best)
    positives = (pairs_2P[0] * len(bank_MD) + pairs_2P[1]).unique().numpy()  # sorted
    for top in range(first, last, AT_ONCE):
        rows = range(top, min(top + AT_ONCE, last))
        for precise in (False, True):
            products = choose_products(queries_ND[rows.start : rows.stop], bank_MD, precise)
            if products is None:
                check_finite(queries=queries_ND, bank=bank_MD)
                return None
            if _count_rows(queries_ND, bank_MD, row, column, positives, rows, products, in_float64):
                break
    return row, column


def _count_rows(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    row: Side,
    column: Side,
    positives: np.ndarray,
    rows: range,
    products: Products,
    in_float64: Callable[[Side, Side, range, range], None],
) -> bool:
    """Add what these query rows contribute; False, and nothing is added: more precise products suit them better."""
    row_bounds = _bounds(row.threshold[rows.start : rows.stop], products.error_N)

    def look(strip: slice, _: int, columns: range, scores_rm: np.ndarray) -> _Piece:
        # Of all the strip's errors the largest: a column has one pair of bounds.
        column_bounds = _bounds(column.threshold[columns.start : columns.stop], products.error_N[strip].max())
        both = _both_sides(scores_rm, [bound[strip] for bound in row_bounds], column_bounds)
        return _Piece(range(rows.start + strip.start, rows.start + strip.stop), columns, both)

    for number, pieces in enumerate(sweep(products, len(rows), len(bank_MD), look)):
        clear = [piece for piece in pieces if piece.both is not None]
        if number == 0 and products.coarse and len(clear) < _CLEAR * len(pieces):
            return False
        for piece in pieces:
            if piece.both is None:
                in_float64(row, column, piece.rows, piece.columns)
                continue
            of_row, of_column = piece.both
            row.counts[0, piece.rows.start : piece.rows.stop] += torch.from_numpy(of_row.row_r)
            column.counts[0, piece.columns.start : piece.columns.stop] += torch.from_numpy(of_column.column_m)
        _settle(queries_ND, bank_MD, row, column, positives, clear)
    return True


class _Piece(NamedTuple):
    """Rows and columns that were looked at."""

    rows: range
    columns: range
    both: tuple[Close, Close] | None
    """What was found beside the bounds of rows and of columns; None: too much is close to them."""


def _settle(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    row: Side,
    column: Side,
    positives: np.ndarray,
    pieces: Sequence[_Piece],
) -> None:
    """Count the close pairs of pieces, none of which has too many, by exact scores; positives are not counted."""
    for side, which in ((row, 0), (column, 1)):
        found = [(piece.both[which], piece) for piece in pieces]
        r, c = (
            np.concatenate([np.empty(0, dtype=np.int64), *parts])
            for parts in (
                [close.rows + piece.rows.start for close, piece in found],
                [close.columns + piece.columns.start for close, piece in found],
            )
        )
        key = r * len(bank_MD) + c
        at = np.searchsorted(positives, key)
        other = np.ones(len(key), dtype=bool)
        if len(positives):
            other = positives[np.minimum(at, len(positives) - 1)] != key
        r, c = torch.from_numpy(r[other]), torch.from_numpy(c[other])
        items, others = (r, c) if side is row else (c, r)
        side.settle(items, others, exact_pairs(queries_ND, bank_MD, r, c))


def _bounds(threshold: torch.Tensor, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the threshold less and more the error in fp32, rounded away from it."""
    low = (threshold.numpy() - error).astype(np.float32)
    high = (threshold.numpy() + error).astype(np.float32)
    below = np.nextafter(low, np.float32(-np.inf))
    below[np.isinf(low)] = np.inf  # no positive: nothing counts
    return below, np.nextafter(high, np.float32(np.inf))


def _both_sides(
    scores_rm: np.ndarray, row_bounds: Sequence[np.ndarray], column_bounds: Sequence[np.ndarray]
) -> tuple[Close, Close] | None:
    """Compare a piece with the bounds of its rows and of its columns; None: too many are close."""
    most = max(_FEW_CLOSE, int(scores_rm.size * _CLOSE_SHARE)) + scores_rm.shape[1]
    if not cpu_scans.available():
        of_row = find_above(scores_rm, *(bound[:, None] for bound in row_bounds))
        of_column = find_above(scores_rm, *(bound[None] for bound in column_bounds))
        return None if max(len(of_row.rows), len(of_column.rows)) > most else (of_row, of_column)
    found = cpu_scans.find_above(scores_rm, row_bounds, column_bounds, most)
    if found is None:
        return None
    counts = found.row_r.astype(np.int64), found.column_m.astype(np.int64)
    of_row, of_column = (Close(*counts, *(index.astype(np.int64) for index in found.close_to(side))) for side in (0, 1))
    return of_row, of_column
