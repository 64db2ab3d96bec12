"""Ranks of the best positives in both directions from one pass over the scores, without keeping the N×M matrix.

The reference form counts float64 products; `rank_count_segmented` on the CPU and `rank_count_triton` on a GPU count
faster ones and give the same numbers.

Shapes: N queries (rows), M bank rows (columns), D width, P positive pairs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from mmd2v_kernels import fast_products
from mmd2v_kernels.dispatch import choose
from mmd2v_kernels.rank_sides import Best, Side
from mmd2v_kernels.retrieval_order import check_embeddings, check_shapes, exact_pairs, product_error


class RankCounts(NamedTuple):
    """How many non-positives stand before the best positive. Counts over disjoint row ranges add up.

    Each is int64 [3, N] or [3, M]: strictly better scores; equal scores at a lower index; equal scores at a higher
    index. The rank is the sum of the first two; the first alone is the best rank any order of ties could give, the
    sum of all three the worst.
    """

    row: torch.Tensor
    column: torch.Tensor


def rank_count(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    positives_P2: torch.Tensor,
    *,
    block_rows: int = 1024,
    block_columns: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rank_row [N], rank_column [M])``: the zero-based rank of the best positive, int64.

    ``positives_P2`` is int64 [P, 2], pairs of (row, column), in any order and any number a row or column. Rows are
    ranked against all columns and columns against all rows, by score, then lowest index (`retrieval_order`);
    positives never count against each other. A row or column without positive gets −1.
    Raises ValueError for embeddings that are not finite, widths that differ, or pairs out of range.
    """
    counts = count_ahead(
        queries_ND, bank_MD, positives_P2, rows=None, block_rows=block_rows, block_columns=block_columns
    )
    ranks = []
    for side, count in enumerate(counts):
        rank = count[0] + count[1]
        missing = torch.ones_like(rank, dtype=torch.bool)
        missing[positives_P2[:, side]] = False
        ranks.append(rank.masked_fill(missing, -1))
    return ranks[0], ranks[1]


def count_ahead(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    positives_P2: torch.Tensor,
    *,
    rows: tuple[int, int] | None = None,
    row_best: Best | None = None,
    block_rows: int = 1024,
    block_columns: int = 4096,
) -> RankCounts:
    """Return the `RankCounts` that the scores of the query rows ``rows[0] <= row < rows[1]`` contribute.

    This is `rank_count` for several processes that hold the same embeddings: each takes a range of rows, and the sum
    of their counts is that of the whole. Or each holds a part of the bank with the positives in it, and ``row_best`` is
    the best of all their `best_positives`, counted from the part's first row: the row counts then add up, and the
    column counts are those of the part. Rows without positive count nothing. Memory beyond the inputs: blocks of
    scores and the pairs in them that are too close to call, and on the CPU 16-bit integers of up to 32,768 queries and
    a block of the bank. Raises ValueError as `rank_count` does.
    """
    path = _path(queries_ND, bank_MD)
    (check_embeddings if path == "reference" else check_shapes)(
        queries_ND, bank_MD
    )  # the others see what is not finite
    _check_positives(positives_P2, len(queries_ND), len(bank_MD))
    pairs_2P = positives_P2.to(queries_ND.device).t().contiguous()
    first, last = rows if rows is not None else (0, len(queries_ND))

    @cache
    def error_of_float64() -> torch.Tensor:
        return product_error(queries_ND, bank_MD)

    def in_float64(row: Side, column: Side, rows: range, columns: range) -> None:
        for top in range(rows.start, rows.stop, block_rows):
            for left in range(columns.start, columns.stop, block_columns):
                block = (
                    range(top, min(top + block_rows, rows.stop)),
                    range(left, min(left + block_columns, columns.stop)),
                )
                _count(queries_ND, bank_MD, pairs_2P, row, column, error_of_float64(), *block)

    sides = None
    if path == "triton":
        from mmd2v_kernels.rank_count_triton import count_sides

        sides = count_sides(queries_ND, bank_MD, pairs_2P, first, last, in_float64, row_best)
    elif path == "segmented":
        from mmd2v_kernels.rank_count_segmented import count_sides

        sides = count_sides(queries_ND, bank_MD, pairs_2P, first, last, in_float64, row_best)
    if sides is None:
        score_P = exact_pairs(queries_ND, bank_MD, pairs_2P[0], pairs_2P[1])
        sides = Side.both(pairs_2P, score_P, len(queries_ND), len(bank_MD), row_best)
        in_float64(*sides, range(first, last), range(len(bank_MD)))
    return RankCounts(sides[0].counts, sides[1].counts)


def best_positives(queries_ND: torch.Tensor, bank_MD: torch.Tensor, positives_P2: torch.Tensor) -> Best:
    """Return the best positive of each query, by score, then lowest index. Raises ValueError as `rank_count` does."""
    check_shapes(queries_ND, bank_MD)
    _check_positives(positives_P2, len(queries_ND), len(bank_MD))
    pairs_2P = positives_P2.to(queries_ND.device).t().contiguous()
    side = Side.of_best(*pairs_2P, exact_pairs(queries_ND, bank_MD, pairs_2P[0], pairs_2P[1]), len(queries_ND))
    return Best(side.threshold, side.best)


def _path(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> str:
    obstacles = {"segmented": fast_products.obstacle(queries_ND, bank_MD)}
    if torch.float64 in (queries_ND.dtype, bank_MD.dtype):
        obstacles["triton"] = "the kernels have no float64"
    elif queries_ND.device != bank_MD.device:
        obstacles["triton"] = "the bank is on another device"
    obstacles = {path: reason for path, reason in obstacles.items() if reason is not None}
    return choose("rank_count", queries_ND.device, queries_ND.dtype, rows=len(queries_ND), obstacles=obstacles).path


def _count(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    pairs_2P: torch.Tensor,
    row: Side,
    column: Side,
    error_N: torch.Tensor,
    rows: range,
    columns: range,
) -> None:
    """Count one block by its float64 product."""
    top, left = rows.start, columns.start
    scores_nm = queries_ND[top : rows.stop].double() @ bank_MD[left : columns.stop].double().t()
    inside_P = (pairs_2P[0] >= top) & (pairs_2P[0] < rows.stop) & (pairs_2P[1] >= left) & (pairs_2P[1] < columns.stop)
    here_2P = pairs_2P[:, inside_P]
    scores_nm[here_2P[0] - top, here_2P[1] - left] = -torch.inf
    error = float(error_N[top : rows.stop].max())

    r, c = row.count(scores_nm, row.threshold[top : rows.stop, None], error, dim=1, offset=top)
    row.settle(r + top, c + left, exact_pairs(queries_ND, bank_MD, r + top, c + left))

    r, c = column.count(scores_nm, column.threshold[None, left : columns.stop], error, dim=0, offset=left)
    column.settle(c + left, r + top, exact_pairs(queries_ND, bank_MD, r + top, c + left))


def _check_positives(positives_P2: torch.Tensor, n: int, m: int) -> None:
    if positives_P2.ndim != 2 or positives_P2.shape[1] != 2 or positives_P2.dtype != torch.int64:
        raise ValueError(f"positives: expected int64 [P, 2], found {positives_P2.dtype} {list(positives_P2.shape)}")
    for side, (name, size) in enumerate((("row", n), ("column", m))):
        index = positives_P2[:, side]
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(
                f"positives: {name} indices span {int(index.min())}..{int(index.max())}, expected 0..{size - 1}"
            )
