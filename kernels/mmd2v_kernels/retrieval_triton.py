"""What the Triton kernels of `rank_count` and `cosine_topk` share: 16-bit operands, how wrong their product can be, and
the exact score of pairs.

A product of fp16 (or, of bf16 embeddings, bf16) operands on tensor cores is the fast pass. It is believed only beyond
an error bound, which is computed from the rows that are there and not from a norm they are said to have; pairs within
it are scored again in float64, in the order of additions that `retrieval_order.exact_dot` lays down. fp16, not bf16,
for fp32 embeddings: its rounding is an eighth, so far fewer pairs are in doubt, and it runs at the same rate.

Shapes: n rows of one matrix, D width, P pairs; in a product M rows, N columns, K depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmd2v_kernels.configuration import TRITON_NAMES, Configuration
from mmd2v_kernels.retrieval_order import fold

__all__ = ["Operand", "configurations", "error_bound", "exact_pairs", "operand", "operand_dtype", "score_tile"]

_ROWS, _PAIRS = 8, 4
"""Rows of a program of the first kernel, pairs of one of the second."""
_CHUNK = 1 << 18
"""Pairs whose partial sums (96 columns of float64 at width 768) are in memory at once: 200 MB."""
_SCALE = 256.0
"""That keeps elements of L2-normalised rows among the normal numbers of fp16, and far from its largest."""
_TINY = 2.0**-62
"""Squares of anything smaller may vanish in fp32, so the norms that are added up in it may lack that much."""


@triton.jit(do_not_specialize=["rows"])
def _operand_kernel(
    rows_ptr,  # [n, D]
    operand_ptr,  # 16 bits [n, D] out, if STORE
    norms_ptr,  # fp32 [2, n] out: norm of a scaled row, norm of what rounding takes from it
    rows,  # n
    width,  # D
    scale,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    norm = tl.zeros([ROWS], dtype=tl.float32)
    lost = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = is_row[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        x = tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
        rounded = x.to(operand_ptr.dtype.element_ty)
        if STORE:
            tl.store(operand_ptr + at, rounded, mask=inside)
        difference = x - rounded.to(tl.float32)
        norm += tl.sum(x * x, axis=1)
        lost += tl.sum(difference * difference, axis=1)
    tl.store(norms_ptr + row, tl.sqrt(norm), mask=is_row)
    tl.store(norms_ptr + rows + row, tl.sqrt(lost), mask=is_row)


@triton.jit
def _product(left_ptr, right_ptr, mask, at):
    left = tl.load(left_ptr + at, mask=mask, other=0.0).to(tl.float64)
    return left * tl.load(right_ptr + at, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _fold_eight(left_ptr, right_ptr, mask, step):
    """Products that lie ``step`` apart, added as three folds of halves would add them."""
    low = (_product(left_ptr, right_ptr, mask, 0) + _product(left_ptr, right_ptr, mask, 4 * step)) + (
        _product(left_ptr, right_ptr, mask, 2 * step) + _product(left_ptr, right_ptr, mask, 6 * step)
    )
    high = (_product(left_ptr, right_ptr, mask, step) + _product(left_ptr, right_ptr, mask, 5 * step)) + (
        _product(left_ptr, right_ptr, mask, 3 * step) + _product(left_ptr, right_ptr, mask, 7 * step)
    )
    return low + high


@triton.jit(do_not_specialize=["pairs"])
def _pairs_kernel(
    left_ptr,  # [n, D]
    right_ptr,  # [m, D]
    row_ptr,  # int64 [P]
    column_ptr,  # int64 [P]
    sums_ptr,  # fp64 [P, D / PARTS] out
    pairs,  # P
    width,  # D
    PARTS: tl.constexpr,  # 1, or 8 where D is a multiple of that
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold D products down to D / PARTS sums. A product is exact in float64, so a fused addition changes nothing."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < pairs
    row = tl.load(row_ptr + pair, mask=is_pair, other=0)
    column = tl.load(column_ptr + pair, mask=is_pair, other=0)
    part = width // PARTS
    for start in range(0, part, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = is_pair[:, None] & (place < part)[None, :]
        left = left_ptr + row[:, None] * width + place[None, :]
        right = right_ptr + column[:, None] * width + place[None, :]
        if PARTS == 1:  # noqa: SIM108
            total = _product(left, right, mask, 0)
        else:
            total = _fold_eight(left, right, mask, part)
        tl.store(sums_ptr + pair[:, None] * part + place[None, :], total, mask=mask)


@triton.jit
def score_tile(
    a_ptr,  # 16 bits [M, K]
    b_ptr,  # 16 bits [N, K]
    row,  # int32 [ROWS] rows of a, all there are
    column,  # int32 [COLUMNS] rows of b, all there are
    depth,  # K
    WHOLE: tl.constexpr,  # K is a multiple of DEPTH
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return the products of rows of a with rows of b, fp32 [ROWS, COLUMNS]."""
    a_ptr += row.to(tl.int64)[:, None] * depth
    b_ptr += column.to(tl.int64)[None, :] * depth
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        if WHOLE:
            a = tl.load(a_ptr + k[None, :])
            b = tl.load(b_ptr + k[:, None])
        else:
            a = tl.load(a_ptr + k[None, :], mask=(k < depth)[None, :], other=0.0)
            b = tl.load(b_ptr + k[:, None], mask=(k < depth)[:, None], other=0.0)
        product = tl.dot(a, b, product)
    return product


class Operand(NamedTuple):
    """A matrix as the fast pass reads it."""

    rows_nD: torch.Tensor
    """fp16 or bf16: the rows times ``scale``, rounded."""
    scale: float
    """A power of two."""
    norm_n: torch.Tensor
    """float64, at least the norm of a scaled row."""
    lost_n: torch.Tensor
    """float64, at least the norm of what rounding took from it."""


def operand_dtype(*matrices: torch.Tensor) -> torch.dtype:
    """Return bfloat16 where all embeddings are that, else float16."""
    return torch.bfloat16 if all(matrix.dtype == torch.bfloat16 for matrix in matrices) else torch.float16


def operand(matrix_nD: torch.Tensor, dtype: torch.dtype) -> Operand | None:
    """Return ``matrix_nD`` as the fast pass reads it, without a copy where it has that dtype already.

    None where no power of two brings its elements into fp32's range, NaN and infinity above all.
    """
    matrix_nD = matrix_nD.contiguous()
    scale = 1.0 if matrix_nD.dtype == dtype else _SCALE
    found, largest = _operand(matrix_nD, dtype, scale)
    if not scale / 16 <= largest <= scale * 64:  # also where it is NaN
        peak = float(matrix_nD.abs().max())
        if not 0 < peak < float("inf"):
            return found if peak == 0 else None
        scale = _SCALE * 2.0 ** -torch.tensor(peak, dtype=torch.float64).frexp().exponent.item()
        if not 2.0**-126 <= scale < 2.0**127:
            return None
        found, largest = _operand(matrix_nD, dtype, scale)
    return found if largest < float("inf") else None


def _operand(matrix_nD: torch.Tensor, dtype: torch.dtype, scale: float) -> tuple[Operand, float]:
    n, width = matrix_nD.shape
    norms_2n = torch.empty(2, n, dtype=torch.float32, device=matrix_nD.device)
    store = scale != 1.0 or matrix_nD.dtype != dtype
    rows_nD = torch.empty_like(matrix_nD, dtype=dtype) if store else matrix_nD
    _operand_kernel[(triton.cdiv(n, _ROWS),)](
        matrix_nD,
        rows_nD,
        norms_2n,
        n,
        width,
        scale,
        STORE=store,
        ROWS=_ROWS,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
    )
    # Sums of D squares in fp32 are right to D · 2⁻²⁴, far within a thousandth.
    upper_2n = norms_2n.double() * 1.001 + _TINY * width**0.5
    return Operand(rows_nD, scale, upper_2n[0], upper_2n[1]), float(norms_2n.amax())


def error_bound(left: Operand, right: Operand) -> torch.Tensor:
    """Return for each left row a bound on |fast score − scaled exact score| over all right rows, float64 [n].

    Rounding: |q·b − q̂·b̂| ≤ ‖q − q̂‖‖b‖ + ‖q̂‖‖b − b̂‖. Summing: a tensor core cuts each of D products off at fp32's last
    bit of the largest, 2⁻²³ of Σ|q̂·b̂| ≤ ‖q̂‖‖b̂‖; taken twice, which covers any order in fp32 as well.
    """
    width = left.rows_nD.shape[1]
    norm, lost = right.norm_n.max(), right.lost_n.max()
    operand_norm_n = left.norm_n + left.lost_n
    summing = (width + 16) * 2.0**-22 * operand_norm_n * (norm + lost)
    return left.lost_n * norm + operand_norm_n * lost + summing + width * 2.0**-120


def exact_pairs(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Do what `retrieval_order.exact_pairs` says, to the last bit, of embeddings of at most 32 bits."""
    width = queries_ND.shape[1]
    parts = 8 if width % 8 == 0 else 1
    scores_P = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for first in range(0, len(rows), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        count = len(rows[chunk])
        sums = torch.empty(count, width // parts, dtype=torch.float64, device=rows.device)
        _pairs_kernel[(triton.cdiv(count, _PAIRS),)](
            queries_ND,
            bank_MD,
            rows[chunk],
            columns[chunk],
            sums,
            count,
            width,
            PARTS=parts,
            PAIRS=_PAIRS,
            BLOCK=min(128, triton.next_power_of_2(width // parts)),
            num_warps=4,
        )
        scores_P[chunk] = fold(sums)
    return scores_P


def configurations() -> list[Configuration]:
    """Return the forms for embeddings of width 768, fp32."""
    rows = f"*{TRITON_NAMES['float32']}"
    first = {"rows_ptr": rows, "operand_ptr": "*fp16", "norms_ptr": "*fp32", "rows": "i32", "width": "i32"}
    first |= {"scale": "fp32"} | dict.fromkeys(["STORE", "ROWS", "BLOCK"], "constexpr")
    second = {"left_ptr": rows, "right_ptr": rows, "row_ptr": "*i64", "column_ptr": "*i64", "sums_ptr": "*fp64"}
    second |= {"pairs": "i32", "width": "i32"} | dict.fromkeys(["PARTS", "PAIRS", "BLOCK"], "constexpr")
    return [
        Configuration(
            "retrieval/operand",
            _operand_kernel,
            first,
            {"STORE": True, "ROWS": _ROWS, "BLOCK": 1024},
            warps=4,
            aligned=("width",),
        ),
        Configuration(
            "retrieval/pairs",
            _pairs_kernel,
            second,
            {"PARTS": 8, "PAIRS": _PAIRS, "BLOCK": 128},
            warps=4,
            aligned=("width",),
        ),
    ]
