"""The one order of retrieval, shared by `rank_count` and `cosine_topk`: by score, then by lowest index.

The score of two rows is their float64 dot product, summed in a fixed order (`exact_dot`), so it depends on the two
rows alone: not on block sizes, shards, threads or devices. A matrix product sums in an order of its library's choice;
what it says is believed only outside the error bound around a threshold, and pairs inside are scored again.

Shapes: P pairs, N queries, M bank rows, D width.
"""

from __future__ import annotations

import torch

from mmd2v_kernels import exact_pairs_cpu

_PAIR_ELEMENTS = 1 << 22
"""Float64 products held at once on a device while pairs are scored again: 32 MiB, which stays in its cache."""

_CHECKED_ROWS = 1 << 14
"""Rows looked at for NaN at once: a mask of a whole bank would be a quarter of it."""


def exact_dot(left_PD: torch.Tensor, right_PD: torch.Tensor) -> torch.Tensor:
    """Return the float64 dot product of each pair of rows, [P].

    Products of values stored in up to 24 bits are exact in float64; the sum folds the upper half onto the lower one
    until a single column is left, with elementwise additions, which IEEE 754 fixes to the last bit on any device.
    """
    return fold(left_PD.double() * right_PD.double())


def fold(sums_PD: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row, [P], in the order of `exact_dot`; overwrites ``sums_PD``.

    Of a width that is a multiple of two, half of the work may have been done before: the order stays.
    """
    width = sums_PD.shape[1]
    while width > 1:
        half = (width + 1) // 2
        sums_PD[:, : width - half] += sums_PD[:, half:width]
        width = half
    return sums_PD[:, 0].clone()


def exact_pairs(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return `exact_dot` of queries ``rows`` [P] with bank rows ``columns`` [P], [P], in bounded memory.

    Far more pairs than rows means many equal rows (a collapsed model): each distinct pair is then scored once.
    """
    if len(rows) > 32 * (len(queries_ND) + len(bank_MD)):
        key = _first_equal(queries_ND)[rows] * len(bank_MD) + _first_equal(bank_MD)[columns]
        distinct, place = key.unique(return_inverse=True)
        rows, columns = distinct // len(bank_MD), distinct % len(bank_MD)
        return _exact_pairs(queries_ND, bank_MD, rows, columns)[place]
    return _exact_pairs(queries_ND, bank_MD, rows, columns)


def _exact_pairs(
    queries_ND: torch.Tensor, bank_MD: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    if rows.device.type == "cpu":
        return exact_pairs_cpu.exact_pairs(queries_ND, bank_MD, rows, columns)
    scores = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    step = max(1, _PAIR_ELEMENTS // queries_ND.shape[1])
    for i in range(0, len(rows), step):
        chunk = slice(i, i + step)
        scores[chunk] = exact_dot(queries_ND[rows[chunk]], bank_MD[columns[chunk]])
    return scores


def _first_equal(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return for each row the lowest index of a row equal to it, int64 [N]."""
    distinct, group = rows_ND.unique(dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(rows_ND), dtype=torch.int64, device=rows_ND.device)
    first.scatter_reduce_(0, group, torch.arange(len(rows_ND), device=rows_ND.device), "amin")
    return first[group]


def product_error(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> torch.Tensor:
    """Return for each query a bound on |float64 matrix product − `exact_dot`| over the whole bank, float64 [N].

    Any order of summation is within γ·Σ|q·b| of the true sum, γ ≈ D·2⁻⁵³ (Higham, Accuracy and Stability of Numerical
    Algorithms, §3.1); both sums err, and a third share covers the rounding of the comparison. Σ|q·b| ≤ ‖q‖₁·max|b|.
    """
    gamma = (queries_ND.shape[1] + 2) * 2.0**-53
    lowest, highest = bank_MD.aminmax()  # not of abs(), which would copy the bank
    largest = torch.maximum(-lowest, highest).double()
    return 3 * gamma * queries_ND.abs().sum(1, dtype=torch.float64) * largest


def check_embeddings(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> None:
    """Raise ValueError unless both are finite floating matrices of one width, on one device, with at least one row."""
    check_shapes(queries_ND, bank_MD)
    check_finite(queries=queries_ND, bank=bank_MD)
    if queries_ND.device != bank_MD.device:
        raise ValueError(f"queries are on {queries_ND.device}, but the bank is on {bank_MD.device}")


def check_shapes(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> None:
    """Raise ValueError unless both are floating matrices of one width with at least one row."""
    for name, matrix in (("queries", queries_ND), ("bank", bank_MD)):
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(f"{name}: expected a matrix [rows, width] without empty sides, found {list(matrix.shape)}")
        if not matrix.is_floating_point():
            raise ValueError(f"{name}: expected floating point embeddings, found {matrix.dtype}")
    if queries_ND.shape[1] != bank_MD.shape[1]:
        raise ValueError(f"queries are {queries_ND.shape[1]} wide, but the bank is {bank_MD.shape[1]} wide")


def check_finite(**matrices: torch.Tensor) -> None:
    """Raise ValueError for a matrix that holds NaN or infinity."""
    for name, matrix in matrices.items():
        bad = sum(int((~torch.isfinite(rows).all(1)).sum()) for rows in matrix.split(_CHECKED_ROWS))
        if bad:
            raise ValueError(f"{name}: {bad} of {len(matrix)} rows hold NaN or infinity")
