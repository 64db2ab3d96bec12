"""Triton kernel of `rank_count`: both directions from one product on tensor cores that is never written to memory.

The epilogue of a tile counts, for each of its rows and columns, the scores that are above the threshold by more than
the error of the fast pass, and lists the pairs that are too close to call; those are scored exactly. Positives need no
mask: none has a score above the best of them, so none is ever surely above, and those on the list are taken off it. A
list that runs over is thrown away with the counts of its rows, which are then counted in float64. Counts are integers,
so the order of the atomic additions does not matter.

Shapes: N queries (rows), M bank rows (columns), D width, P positive pairs, n rows of one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import Configuration
from mmd2v_kernels.rank_sides import Best, Side
from mmd2v_kernels.retrieval_order import check_finite
from mmd2v_kernels.retrieval_triton import error_bound, exact_pairs, operand, operand_dtype, score_tile

__all__ = ["SIZES", "Sizes", "configurations", "count_sides"]

ROW_IS_CLOSE, COLUMN_IS_CLOSE = 1, 2
"""The two bits of a listed pair: whose threshold it is too close to."""
_EXPANDED = 1 << 18
"""Listed words that are made pairs at a time."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the pieces of work."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 16
    """Tiles of rows that pass a tile of columns before the next: so many share what is in the cache."""
    launch_rows: int = 8192
    listed: int = 1 << 22
    """Words of pairs that are too close to call, at most, in one launch: 50 MB."""


SIZES = Sizes()


@triton.jit(do_not_specialize=["rows", "columns", "capacity"])  # one form for any number of rows
def _count_kernel(
    a_ptr,  # 16 bits [n, K]
    b_ptr,  # 16 bits [M, K]
    row_bounds_ptr,  # fp32 [2, n]: from the first on a score may be above the threshold, beyond the second it is
    column_bounds_ptr,  # fp32 [2, M]
    row_above_ptr,  # int32 [n] out
    column_above_ptr,  # int32 [M] out
    first_ptr,  # int64 [capacity] out: row · M + column of the first pair of a word
    word_ptr,  # int32 [capacity] out: of 16 pairs whose threshold each is too close to, 2 bits each
    number_ptr,  # int32 [1] out: how many words there are, whether they fit or not
    rows,  # n
    columns,  # M
    depth,  # K
    capacity,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    in_group = GROUP * tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + tl.program_id(0) % in_group % height
    column_tile = tl.program_id(0) % in_group // height
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    there, here = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    score = score_tile(a_ptr, b_ptr, there, here, depth, WHOLE, ROWS, COLUMNS, DEPTH)
    score = tl.where(is_row[:, None] & is_column[None, :], score, float("-inf"))

    # Two counts in one number, so that one sum gives both: above in the lower 16 bits, close in the upper.
    low = tl.load(row_bounds_ptr + there)
    high = tl.load(row_bounds_ptr + rows + there)
    counts = tl.where(score > high[:, None], 1, tl.where(score >= low[:, None], 65536, 0))
    of_row = tl.sum(counts, axis=1)
    above = of_row & 65535
    tl.atomic_add(row_above_ptr + row, above, mask=is_row & (above > 0), sem="relaxed")
    column_low = tl.load(column_bounds_ptr + here)
    column_high = tl.load(column_bounds_ptr + columns + here)
    counts = tl.where(score > column_high[None, :], 1, tl.where(score >= column_low[None, :], 65536, 0))
    of_column = tl.sum(counts, axis=0)
    above = of_column & 65535
    tl.atomic_add(column_above_ptr + column, above, mask=is_column & (above > 0), sem="relaxed")

    close = tl.sum(of_row >> 16, axis=0) + tl.sum(of_column >> 16, axis=0)
    if close > 0:
        # Sixteen columns of a row, WORDS apart so that a thread holds them all, make one word of two bits each: what
        # would be an address for every score is one for a word, and few are not 0.
        of_row_close = (score >= low[:, None]) & (score <= high[:, None])
        of_column_close = (score >= column_low[None, :]) & (score <= column_high[None, :])
        whose = of_row_close.to(tl.int32) | (of_column_close.to(tl.int32) << 1)
        WORDS: tl.constexpr = COLUMNS // 16
        bits = tl.reshape(whose << (tl.arange(0, COLUMNS) // WORDS * 2)[None, :], (ROWS, 16, WORDS))
        word = tl.sum(bits, axis=1)
        place = tl.atomic_add(number_ptr + tl.zeros([ROWS, WORDS], dtype=tl.int32), 1, mask=word != 0, sem="relaxed")
        fits = (word != 0) & (place < capacity)
        pair = row.to(tl.int64)[:, None] * columns + (column_tile * COLUMNS + tl.arange(0, WORDS))[None, :]
        tl.store(first_ptr + place, pair, mask=fits)
        tl.store(word_ptr + place, word, mask=fits)


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

    Raises ValueError for values that are not finite. ``in_float64(row, column, rows, columns)`` counts rows whose pairs
    are too many to list.
    """
    queries_ND, bank_MD, dtype = queries_ND.contiguous(), bank_MD.contiguous(), operand_dtype(queries_ND, bank_MD)
    queries, bank = operand(queries_ND, dtype), operand(bank_MD, dtype)
    if queries is None or bank is None:
        check_finite(queries=queries_ND, bank=bank_MD)
        return None
    score_P = exact_pairs(queries_ND, bank_MD, pairs_2P[0], pairs_2P[1])
    row, column = Side.both(pairs_2P, score_P, len(queries_ND), len(bank_MD), row_best)
    positives = (pairs_2P[0] * len(bank_MD) + pairs_2P[1]).unique()  # sorted
    scale, error_N = queries.scale * bank.scale, error_bound(queries, bank)
    device, columns, depth, capacity = queries_ND.device, len(bank_MD), queries_ND.shape[1], SIZES.listed
    first_c = torch.empty(capacity, dtype=torch.int64, device=device)
    word_c = torch.empty(capacity, dtype=torch.int32, device=device)
    launch_rows = max(1, min(SIZES.launch_rows, 2**34 // columns))  # so that the number of words is below 2³¹
    for top in range(first, last, launch_rows):
        bottom = min(top + launch_rows, last)
        row_bounds_2n = _bounds(row.threshold[top:bottom] * scale, error_N[top:bottom])
        column_bounds_2M = _bounds(column.threshold * scale, error_N[top:bottom].max())
        row_above_n = torch.zeros(bottom - top, dtype=torch.int32, device=device)
        column_above_M = torch.zeros(columns, dtype=torch.int32, device=device)
        number = torch.zeros(1, dtype=torch.int32, device=device)
        tiles = triton.cdiv(bottom - top, SIZES.rows) * triton.cdiv(columns, SIZES.columns)
        _count_kernel[(tiles,)](
            queries.rows_nD[top:bottom],
            bank.rows_nD,
            row_bounds_2n,
            column_bounds_2M,
            row_above_n,
            column_above_M,
            first_c,
            word_c,
            number,
            bottom - top,
            columns,
            depth,
            capacity,
            WHOLE=depth % SIZES.depth == 0,
            ROWS=SIZES.rows,
            COLUMNS=SIZES.columns,
            DEPTH=SIZES.depth,
            GROUP=SIZES.group,
            num_warps=SIZES.warps,
            num_stages=SIZES.stages,
        )
        found = int(number)
        if found > capacity:
            in_float64(row, column, range(top, bottom), range(columns))
            continue
        row.counts[0, top:bottom] += row_above_n
        column.counts[0] += column_above_M
        for start in range(0, found, _EXPANDED):
            chunk = slice(start, min(start + _EXPANDED, found))
            rows_p, columns_p, whose_p = _pairs(first_c[chunk], word_c[chunk], columns, positives, top)
            score_p = exact_pairs(queries_ND, bank_MD, rows_p, columns_p)
            for side, items, others, flag in (
                (row, rows_p, columns_p, ROW_IS_CLOSE),
                (column, columns_p, rows_p, COLUMN_IS_CLOSE),
            ):
                close = (whose_p & flag) != 0
                side.settle(items[close], others[close], score_p[close])
    return row, column


def _pairs(
    first_w: torch.Tensor, word_w: torch.Tensor, columns: int, positives: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row, column and whose threshold of each pair in the words, positives left out."""
    place_16 = torch.arange(16, dtype=torch.int32, device=word_w.device)
    whose_w16 = (word_w[:, None] >> 2 * place_16) & 3
    word, place = whose_w16.nonzero(as_tuple=True)
    whose_p = whose_w16[word, place]
    pair_p = first_w[word] + place * (SIZES.columns // 16) + top * columns
    if len(positives):
        at = torch.searchsorted(positives, pair_p).clamp(max=len(positives) - 1)
        is_other = positives[at] != pair_p
        pair_p, whose_p = pair_p[is_other], whose_p[is_other]
    return pair_p // columns, pair_p % columns, whose_p


def _bounds(threshold_n: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return fp32 [2, n], the threshold less and more the error, rounded away from it."""
    infinity = torch.tensor(float("inf"), device=threshold_n.device)
    low, high = (threshold_n - error).float(), (threshold_n + error).float()
    return torch.stack([low.nextafter(-infinity).where(threshold_n < infinity, infinity), high.nextafter(infinity)])


def configurations() -> list[Configuration]:
    """Return the forms for operands of width 768, fp16 and bf16."""
    bounds = {"row_bounds_ptr": "*fp32", "column_bounds_ptr": "*fp32", "row_above_ptr": "*i32"}
    bounds |= {"column_above_ptr": "*i32", "first_ptr": "*i64", "word_ptr": "*i32", "number_ptr": "*i32"}
    bounds |= {"rows": "i32", "columns": "i32", "depth": "i32", "capacity": "i32"}
    bounds |= dict.fromkeys(["WHOLE", "ROWS", "COLUMNS", "DEPTH", "GROUP"], "constexpr")
    sizes = {"ROWS": SIZES.rows, "COLUMNS": SIZES.columns, "DEPTH": SIZES.depth, "GROUP": SIZES.group}
    return [
        Configuration(
            f"rank_count/{name}",
            _count_kernel,
            {"a_ptr": f"*{name}", "b_ptr": f"*{name}"} | bounds,
            {"WHOLE": True} | sizes,
            SIZES.warps,
            SIZES.stages,
            tensor_cores=True,
            aligned=("depth",),
        )
        for name in ("fp16", "bf16")
    ]
