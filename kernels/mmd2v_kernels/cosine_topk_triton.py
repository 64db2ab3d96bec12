"""Triton kernels of `cosine_topk`: exact, without a matrix of scores in memory and without a sort inside a tile.

1. A product on tensor cores, of which the epilogue keeps the maxima of bins of BIN columns. The columns of a bin are
   BINS apart within their tile, so that one thread holds them.
2. The best bins of each query. At least k rows score no less than the k-th best maximum minus the error of the product,
   so every row among the k best lies in a bin whose maximum is at most twice that error below it.
3. The scores of the rows in those bins again, in fp32 of the same operands; those at most twice the error below the
   k-th best are scored exactly and sorted by (score, lowest index).

Queries with more bins or rows in doubt than there are places, which equal or collapsed rows make, are done in float64.
The bank may lie in host memory, memory-mapped too: blocks are copied to the device while the block before is searched.

Shapes: N queries, M bank rows, D width, n queries of one launch, m rows of a block of the bank, c candidates a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import Configuration
from mmd2v_kernels.retrieval_order import check_finite
from mmd2v_kernels.retrieval_triton import Operand, error_bound, exact_pairs, operand, operand_dtype, score_tile

__all__ = ["LARGEST_K", "SIZES", "Sizes", "configurations", "topk"]

LARGEST_K = 128
_CANDIDATES_DEPTH = 128


@dataclass(frozen=True)
class Sizes:
    """Sizes of the pieces of work."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    bin: int | None = None
    """Columns of a bin; None: 16, 32 or 64, by the size of the bank."""
    reserve: int = 16
    """Bins and candidates a query beyond k (and a quarter of k) that may be in doubt."""
    maxima: int = 1 << 26
    """Maxima of bins in memory at once: 256 MB."""
    block: int = 1 << 20
    """Rows of the bank searched at once."""
    copied: int = 1 << 16
    """Rows of a bank in host memory that are copied at once."""


SIZES = Sizes()


@triton.jit(do_not_specialize=["rows", "columns", "bins"])  # one form for any number of rows
def _maxima_kernel(
    a_ptr,  # 16 bits [n, K]
    b_ptr,  # 16 bits [m, K]
    allowed_ptr,  # uint8 [m] 1 = may be found
    maxima_ptr,  # fp32 [n, bins] out
    rows,  # n
    columns,  # m
    bins,  # COLUMNS / BIN of each tile
    depth,  # K
    HAS_ALLOWED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIN: tl.constexpr,
):
    # All rows of a launch pass a tile of columns before the next, which is then still in the cache.
    row_tiles = tl.cdiv(rows, ROWS)
    column_tile = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    counts = column < columns
    score = score_tile(
        a_ptr, b_ptr, tl.minimum(row, rows - 1), tl.minimum(column, columns - 1), depth, WHOLE, ROWS, COLUMNS, DEPTH
    )
    if HAS_ALLOWED:
        counts = counts & (tl.load(allowed_ptr + column, mask=counts, other=0) != 0)
    score = tl.where(counts[None, :], score, float("-inf"))
    BINS: tl.constexpr = COLUMNS // BIN
    best = tl.max(tl.reshape(score, (ROWS, BIN, BINS)), axis=1)
    place = column_tile * BINS + tl.arange(0, BINS)
    tl.store(maxima_ptr + row.to(tl.int64)[:, None] * bins + place[None, :], best, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["chosen", "columns"])
def _candidates_kernel(
    a_ptr,  # 16 bits [n, K]
    b_ptr,  # 16 bits [m, K]
    allowed_ptr,  # uint8 [m]
    bin_ptr,  # int64 [n, chosen]
    score_ptr,  # fp32 [n, chosen, BIN] out, -inf where there is no row
    chosen,
    columns,  # m
    depth,  # K
    HAS_ALLOWED: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a tile of `_maxima_kernel`
    BIN: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = tl.load(bin_ptr + row * chosen + place)
    BINS: tl.constexpr = COLUMNS // BIN
    column = which // BINS * COLUMNS + which % BINS + BINS * tl.arange(0, BIN)
    counts = column < columns
    if HAS_ALLOWED:
        counts = counts & (tl.load(allowed_ptr + column, mask=counts, other=0) != 0)
    total = tl.zeros([BIN, DEPTH], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(a_ptr + row * depth + k, mask=k < depth, other=0.0).to(tl.float32)
        inside = counts[:, None] & (k < depth)[None, :]
        b = tl.load(b_ptr + column[:, None] * depth + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += a[None, :] * b
    at = (row * chosen + place) * BIN + tl.arange(0, BIN)
    tl.store(score_ptr + at, tl.where(counts, tl.sum(total, axis=1), float("-inf")))


def topk(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    allowed_M: torch.Tensor | None,
    in_float64: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `mmd2v_kernels.cosine_topk` says, for k up to `LARGEST_K`.

    ``in_float64(queries, bank, allowed)`` does it for queries whose candidates are too many, over one block; where
    fewer than k rows may be found there, what is missing has the score −inf. Raises ValueError for values that are not
    finite.
    """
    queries_ND = queries_ND.contiguous()
    n, device = len(queries_ND), queries_ND.device
    best_Nk = torch.full((n, k), -torch.inf, dtype=torch.float64, device=device)
    index_Nk = torch.zeros(n, k, dtype=torch.int64, device=device)
    dtype = operand_dtype(queries_ND, bank_MD)
    queries = operand(queries_ND, dtype)
    if queries is None:
        check_finite(queries=queries_ND)
    for left, block_mD in _blocks(bank_MD, device):
        allowed_m = None if allowed_M is None else allowed_M[left : left + len(block_mD)].to(device)
        bank = operand(block_mD, dtype)
        if bank is None:
            check_finite(bank=block_mD)
        size = _bin_size(len(block_mD), k, queries_ND.shape[1])
        bins = triton.cdiv(len(block_mD), SIZES.columns) * (SIZES.columns // size)
        launch = max(1, SIZES.maxima // bins)
        launch = launch if launch < SIZES.rows else launch // SIZES.rows * SIZES.rows
        for top in range(0, n, launch):
            rows = slice(top, min(top + launch, n))
            if queries is None or bank is None:
                score_nk, found_nk = in_float64(queries_ND[rows], block_mD, allowed_m)
            else:
                part = queries._replace(
                    rows_nD=queries.rows_nD[rows], norm_n=queries.norm_n[rows], lost_n=queries.lost_n[rows]
                )
                score_nk, found_nk = _block(
                    queries_ND[rows], part, block_mD, bank, k, allowed_m, size, bins, in_float64
                )
            # What was found before comes first: equal scores stay ordered by index through the stable sort.
            together = torch.cat([best_Nk[rows], score_nk], dim=1)
            order = together.argsort(dim=1, descending=True, stable=True)[:, :k]
            best_Nk[rows] = together.gather(1, order)
            index_Nk[rows] = torch.cat([index_Nk[rows], found_nk + left], dim=1).gather(1, order)
    return best_Nk, index_Nk


def _block(
    queries_nD: torch.Tensor,
    queries: Operand,
    bank_mD: torch.Tensor,
    bank: Operand,
    k: int,
    allowed_m: torch.Tensor | None,
    size: int,
    bins: int,
    in_float64: Callable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and places in this block of each query's k best, −inf where it has fewer."""
    n, m, width, device = len(queries_nD), len(bank_mD), queries_nD.shape[1], queries_nD.device
    allowed = allowed_m.contiguous().view(torch.uint8) if allowed_m is not None else queries.rows_nD
    places = k + k // 4 + SIZES.reserve
    chosen = min(bins, places)
    maxima_nB = torch.empty(n, bins, dtype=torch.float32, device=device)
    flags = {"HAS_ALLOWED": allowed_m is not None, "COLUMNS": SIZES.columns, "BIN": size}
    _maxima_kernel[(triton.cdiv(n, SIZES.rows) * triton.cdiv(m, SIZES.columns),)](
        queries.rows_nD,
        bank.rows_nD,
        allowed,
        maxima_nB,
        n,
        m,
        bins,
        width,
        WHOLE=width % SIZES.depth == 0,
        ROWS=SIZES.rows,
        DEPTH=SIZES.depth,
        num_warps=SIZES.warps,
        num_stages=SIZES.stages,
        **flags,
    )
    error_n1 = error_bound(queries, bank)[:, None]
    maximum_nb, bin_nb = maxima_nB.topk(chosen, dim=1)
    del maxima_nB
    floor_n1 = _below(maximum_nb[:, min(k, chosen) - 1 : min(k, chosen)], error_n1)
    full_n = torch.zeros(n, dtype=torch.bool, device=device)
    if chosen < bins:  # one more may be in doubt where the last that was chosen is
        full_n = (maximum_nb[:, -1] >= floor_n1[:, 0]) & (maximum_nb[:, -1] > -torch.inf)
    score_nc = torch.empty(n, chosen * size, dtype=torch.float32, device=device)
    _candidates_kernel[(n, chosen)](
        queries.rows_nD,
        bank.rows_nD,
        allowed,
        bin_nb,
        score_nc,
        chosen,
        m,
        width,
        DEPTH=_CANDIDATES_DEPTH,
        num_warps=4,
        **flags,
    )
    kept = min(chosen * size, places)
    score_nc, place_nc = score_nc.topk(kept, dim=1)
    floor_n1 = _below(score_nc[:, min(k, kept) - 1 : min(k, kept)], error_n1)
    if kept < chosen * size:
        full_n |= (score_nc[:, -1] >= floor_n1[:, 0]) & (score_nc[:, -1] > -torch.inf)
    in_tile = SIZES.columns // size
    bin_nc = bin_nb.gather(1, place_nc // size)
    column_nc = bin_nc // in_tile * SIZES.columns + bin_nc % in_tile + in_tile * (place_nc % size)
    row_p, place_p = ((score_nc >= floor_n1) & (score_nc > -torch.inf)).nonzero(as_tuple=True)
    exact_nc = torch.full((n, max(kept, k)), -torch.inf, dtype=torch.float64, device=device)
    exact_nc[row_p, place_p] = exact_pairs(queries_nD, bank_mD, row_p, column_nc[row_p, place_p])
    if kept < k:
        column_nc = torch.cat([column_nc, column_nc.new_zeros(n, k - kept)], dim=1)
    # By index, then stably by score.
    column_nc, order = column_nc.sort(dim=1)
    score_nk, order = exact_nc.gather(1, order).sort(dim=1, descending=True, stable=True)
    score_nk, found_nk = score_nk[:, :k].contiguous(), column_nc.gather(1, order)[:, :k]
    doubtful = full_n.nonzero()[:, 0]
    if len(doubtful):
        score_nk[doubtful], found_nk[doubtful] = in_float64(queries_nD[doubtful], bank_mD, allowed_m)
    return score_nk, found_nk


def _below(kth_n1: torch.Tensor, error_n1: torch.Tensor) -> torch.Tensor:
    """Return fp32 [n, 1], twice the error below, rounded down."""
    return (kth_n1.double() - 2 * error_n1).float().nextafter(torch.tensor(-torch.inf, device=kth_n1.device))


def _bin_size(rows: int, k: int, width: int) -> int:
    """Return the size at which choosing bins and scoring their rows again cost about the same."""
    if SIZES.bin is not None:
        return SIZES.bin
    best = (24 * rows / (2 * k * width)) ** 0.5
    return next((size for size in (16, 32) if best <= 1.5 * size), 64)


def _blocks(bank_MD: torch.Tensor, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Give the first row and the rows of each block of the bank, on the device."""
    if bank_MD.device == device:
        for left in range(0, len(bank_MD), SIZES.block):
            yield left, bank_MD[left : left + SIZES.block].contiguous()
        return
    # Two pinned buffers and two on the device: one is filled while the other is searched.
    shape = (min(SIZES.copied, len(bank_MD)), bank_MD.shape[1])
    pinned = [torch.empty(shape, dtype=bank_MD.dtype, pin_memory=True) for _ in range(2)]
    copies = [torch.empty(shape, dtype=bank_MD.dtype, device=device) for _ in range(2)]
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    copied, searched = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
    lefts = list(range(0, len(bank_MD), SIZES.copied))

    def start(i: int) -> None:
        side, rows = i % 2, bank_MD[lefts[i] : lefts[i] + SIZES.copied]
        copied[side].synchronize()  # the copy before last has left the pinned buffer
        pinned[side][: len(rows)].copy_(rows)
        with torch.cuda.stream(stream):
            stream.wait_event(searched[side])
            copies[side][: len(rows)].copy_(pinned[side][: len(rows)], non_blocking=True)
            copied[side].record(stream)

    # The buffers were allocated for this stream, which may still be using their memory for something older.
    stream.wait_stream(current)
    start(0)
    for i, left in enumerate(lefts):
        if i + 1 < len(lefts):
            start(i + 1)
        current.wait_event(copied[i % 2])
        yield left, copies[i % 2][: min(SIZES.copied, len(bank_MD) - left)]
        searched[i % 2].record(current)
    current.wait_stream(stream)


def configurations() -> list[Configuration]:
    """Return the forms for operands of width 768, bins of 32."""
    found = []
    for name in ("fp16", "bf16"):
        first = {"a_ptr": f"*{name}", "b_ptr": f"*{name}", "allowed_ptr": "*u8"}
        maxima = first | {"maxima_ptr": "*fp32", "rows": "i32", "columns": "i32", "bins": "i32", "depth": "i32"}
        maxima |= dict.fromkeys(["HAS_ALLOWED", "WHOLE", "ROWS", "COLUMNS", "DEPTH", "BIN"], "constexpr")
        constants = {"HAS_ALLOWED": True, "WHOLE": True, "ROWS": SIZES.rows, "COLUMNS": SIZES.columns}
        constants |= {"DEPTH": SIZES.depth, "BIN": 32}
        found.append(
            Configuration(
                f"cosine_topk/maxima/{name}",
                _maxima_kernel,
                maxima,
                constants,
                SIZES.warps,
                SIZES.stages,
                tensor_cores=True,
                aligned=("depth",),
            )
        )
        candidates = first | {"bin_ptr": "*i64", "score_ptr": "*fp32", "chosen": "i32", "columns": "i32"}
        candidates |= {"depth": "i32"}
        candidates |= dict.fromkeys(["HAS_ALLOWED", "COLUMNS", "BIN", "DEPTH"], "constexpr")
        constants = {"HAS_ALLOWED": True, "COLUMNS": SIZES.columns, "BIN": 32, "DEPTH": _CANDIDATES_DEPTH}
        found.append(
            Configuration(
                f"cosine_topk/candidates/{name}", _candidates_kernel, candidates, constants, warps=4, aligned=("depth",)
            )
        )
    return found
