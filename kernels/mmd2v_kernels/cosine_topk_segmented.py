"""CPU path of `cosine_topk`: fp32 products in blocks, and the exact scores of what may be among the k best.

Maxima of strided groups of columns give a first bound from below on the k-th best score, as each of the k best groups
holds one score that high. What reaches the bound less twice the product's error is kept; the bound rises from block to
block.

Shapes: N queries, M bank rows, D width; n and m one block of them, r rows of a piece, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mmd2v_kernels import cpu_scans
from mmd2v_kernels.exact_pairs_cpu import exact_pairs, in_threads
from mmd2v_kernels.fp32_products import BLOCK, BLOCK_COLUMNS, PIECE, error_of_fp32, product, set_bytes
from mmd2v_kernels.retrieval_order import check_finite

__all__ = ["topk"]

_GROUP = 8
"""Columns of a group."""
_LOWEST = np.finfo(np.float32).min
"""A bound that every score reaches, but not the −inf of a row that is left out."""


def topk(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    allowed_M: torch.Tensor | None,
    in_float64: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Do what `mmd2v_kernels.cosine_topk` says; None: the range of the scores is beyond fp32's.

    Raises ValueError for values that are not finite. ``in_float64(queries, bank, allowed)`` does it for queries with
    too many candidates.
    """
    error_N = error_of_fp32(queries_ND, bank_MD)
    if error_N is None:
        check_finite(queries=queries_ND, bank=bank_MD)
        return None
    banned_M = None if allowed_M is None else ~allowed_M.numpy()
    widest = min(BLOCK_COLUMNS, len(bank_MD))
    # Before k rows were seen all are candidates: few queries at once where k is large.
    block_rows = min(BLOCK // widest, max(1, (BLOCK >> 3) // k))
    block_rows = max(1, block_rows // PIECE * PIECE) if block_rows > PIECE else block_rows
    scores = torch.empty(min(block_rows, len(queries_ND)) * widest)
    score_Nk = torch.empty(len(queries_ND), k, dtype=torch.float64)
    index_Nk = torch.empty(len(queries_ND), k, dtype=torch.int64)
    for top in range(0, len(queries_ND), block_rows):
        rows = slice(top, top + block_rows)
        candidates = _compiled_candidates if cpu_scans.available() else _candidates
        found = candidates(queries_ND[rows], bank_MD, k, banned_M, error_N[rows].numpy(), scores)
        if found is None:
            score_Nk[rows], index_Nk[rows] = in_float64(queries_ND[rows], bank_MD, allowed_M)
            continue
        if cpu_scans.multipliable(queries_ND, bank_MD):
            _order(queries_ND[rows], bank_MD, *found, score_Nk[rows], index_Nk[rows])
            continue
        row_c, column_c = (torch.from_numpy(index) for index in found)
        exact_c = exact_pairs(queries_ND[rows], bank_MD, row_c, column_c).numpy()
        order = np.lexsort((found[1], -exact_c, found[0]))
        order = order[_place(found[0][order]) < k]
        score_Nk[rows] = torch.from_numpy(exact_c[order].reshape(-1, k))
        index_Nk[rows] = torch.from_numpy(found[1][order].reshape(-1, k))
    return score_Nk, index_Nk


def _candidates(
    queries_nD: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    banned_M: np.ndarray | None,
    error_n: np.ndarray,
    scores: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return row and column of all pairs that may be among the k best; None: they are too many."""
    n = len(queries_nD)
    most = max(n * (4 * k + 64), BLOCK >> 2)
    floor_n = np.full(n, _LOWEST)
    row_c, column_c = (np.zeros(0, dtype=np.int64) for _ in range(2))
    score_c = np.zeros(0, dtype=np.float32)
    for left in range(0, len(bank_MD), BLOCK_COLUMNS):
        bank_mD = bank_MD[left : left + BLOCK_COLUMNS]
        scores_nm = product(queries_nD, bank_mD, scores).numpy()
        banned_m = None if banned_M is None else banned_M[left : left + len(bank_mD)]

        def look(piece: int, scores_nm=scores_nm, banned_m=banned_m, left=left) -> tuple:
            scores_rm, floor_r = scores_nm[piece : piece + PIECE], floor_n[piece : piece + PIECE]
            if banned_m is not None:
                scores_rm[:, banned_m] = -np.inf
            if left == 0:
                np.maximum(floor_r, _below(_kth_at_least(scores_rm, k), error_n[piece : piece + PIECE]), out=floor_r)
            reaches = np.zeros((len(scores_rm), (scores_rm.shape[1] + 7) // 8), dtype=np.int64)
            np.greater_equal(scores_rm, floor_r[:, None], out=reaches.view(np.bool_)[:, : scores_rm.shape[1]])
            r, c = set_bytes(reaches)
            return r + piece, c + left, scores_rm[r, c]

        found = in_threads(look, range(0, n, PIECE))
        if sum(len(r) for r, _, _ in found) > most:
            return None
        row_c, column_c, score_c = (
            np.concatenate([old, *new])
            for old, new in zip((row_c, column_c, score_c), zip(*found, strict=True), strict=True)
        )
        order = np.lexsort((-score_c, row_c))
        row_c, column_c, score_c = row_c[order], column_c[order], score_c[order]
        kth = _place(row_c) == k - 1
        floor_n[row_c[kth]] = np.maximum(floor_n[row_c[kth]], _below(score_c[kth], error_n[row_c[kth]]))
        keep = score_c >= floor_n[row_c]
        row_c, column_c, score_c = row_c[keep], column_c[keep], score_c[keep]
        if len(row_c) > most:
            return None
    return row_c, column_c


def _compiled_candidates(
    queries_nD: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    banned_M: np.ndarray | None,
    error_n: np.ndarray,
    scores: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Do what `_candidates` does by compiled loops, which keep the k best scores of each row from block to block."""
    n = len(queries_nD)
    most = max(n * (4 * k + 64), BLOCK >> 2)
    best_nk = np.full((n, k), -np.inf, dtype=np.float32)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for left in range(0, len(bank_MD), BLOCK_COLUMNS):
        bank_mD = bank_MD[left : left + BLOCK_COLUMNS]
        scores_nm = product(queries_nD, bank_mD, scores).numpy()
        banned_m = None if banned_M is None else banned_M[left : left + len(bank_mD)]

        def look(piece: int, scores_nm=scores_nm, banned_m=banned_m, left=left) -> tuple | None:
            rows = slice(piece, piece + PIECE)
            if banned_m is not None:
                scores_nm[rows, banned_m] = -np.inf
            of_piece = len(scores_nm[rows]) * (4 * k + 64) + BLOCK_COLUMNS
            found = cpu_scans.find_best(scores_nm[rows], error_n[rows], best_nk[rows], of_piece)
            return (
                None
                if found is None
                else (found[0].astype(np.int64) + piece, found[1].astype(np.int64) + left, found[2])
            )

        found = in_threads(look, range(0, n, PIECE))
        if any(one is None for one in found):
            return None
        kept += found
        if sum(len(row) for row, _, _ in kept) > most:
            kept = [_still_best(kept, best_nk, error_n)]
            if len(kept[0][0]) > most:
                return None
    row_c, column_c, _ = _still_best(kept, best_nk, error_n)
    order = row_c.argsort(kind="stable")
    return row_c[order], column_c[order]


def _still_best(
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]], best_nk: np.ndarray, error_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the candidates that reach what is known of the k-th best scores by now."""
    row_c, column_c, score_c = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    keep = score_c >= _below(best_nk[:, -1], error_n)[row_c]
    return row_c[keep], column_c[keep], score_c[keep]


def _order(
    queries_nD: torch.Tensor,
    bank_MD: torch.Tensor,
    row_c: np.ndarray,
    column_c: np.ndarray,
    score_nk: torch.Tensor,
    index_nk: torch.Tensor,
) -> None:
    """Write the k best of each row's candidates, best first; rows are in ascending order."""
    n, k = score_nk.shape
    starts = np.concatenate([[0], np.bincount(row_c, minlength=n).cumsum()])
    queries, bank = queries_nD.detach().numpy(), bank_MD.detach().numpy()

    def order(top: int) -> None:
        own = starts[top : top + PIECE + 1]
        chosen = slice(top, top + len(own) - 1)
        found = cpu_scans.order_best(queries[chosen], bank, own - own[0], column_c[own[0] : own[-1]], k)
        score_nk[chosen], index_nk[chosen] = (torch.from_numpy(values) for values in found)

    in_threads(order, range(0, n, PIECE))


def _place(row_c: np.ndarray) -> np.ndarray:
    """Return the place of each entry among those of its row, of rows in ascending order."""
    starts = np.flatnonzero(np.diff(row_c, prepend=-1))
    return np.arange(len(row_c)) - np.repeat(starts, np.diff(starts, append=len(row_c)))


def _kth_at_least(scores_rm: np.ndarray, k: int) -> np.ndarray:
    """Return a lower bound on the k-th best score of each row."""
    rows, columns = scores_rm.shape
    groups = columns // _GROUP
    if groups >= 2 * k:
        scores_rm = scores_rm[:, : groups * _GROUP].reshape(rows, _GROUP, groups).max(axis=1)
    if scores_rm.shape[1] < k:
        return np.full(rows, _LOWEST)
    return np.partition(scores_rm, -k, axis=1)[:, -k]


def _below(kth: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return twice the error below the k-th best score, rounded down; an unknown one stays the lowest."""
    known = kth > _LOWEST
    bound = (np.where(known, kth, 0) - 2 * error).astype(np.float32)
    return np.where(known, np.nextafter(bound, np.float32(-np.inf)), _LOWEST)
