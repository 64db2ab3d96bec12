"""CPU path of `cosine_topk`: fast products of strips and pieces, and exact scores of what may be among the k best.

What reaches the k-th best score so far, less twice the products' error, is kept; that bound rises from piece to piece.

Shapes: N queries, M bank rows, D width; r rows of a strip, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mmd2v_kernels import cpu_scans, numpy_scans
from mmd2v_kernels.exact_pairs_cpu import exact_pairs, in_threads
from mmd2v_kernels.fast_products import AT_ONCE, Products, choose_products, sweep
from mmd2v_kernels.numpy_scans import below, place_in_row
from mmd2v_kernels.retrieval_order import check_finite

__all__ = ["topk"]

_KEPT = 256
"""Candidates that a query may have, however few are asked for: 170 MB of all whose state is kept."""
_BEST_AT_ONCE = 1 << 23
"""Scores of the k best of all queries whose state is kept."""


def topk(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    allowed_M: torch.Tensor | None,
    in_float64: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
    precise: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Do what `mmd2v_kernels.cosine_topk` says; None: the range of the scores is beyond fp32's.

    Raises ValueError for values that are not finite. Queries with too many candidates are searched again by ``precise``
    products, and then by ``in_float64(queries, bank, allowed)``.
    """
    banned_M = None if allowed_M is None else ~allowed_M.numpy()
    score_Nk = torch.empty(len(queries_ND), k, dtype=torch.float64)
    index_Nk = torch.empty(len(queries_ND), k, dtype=torch.int64)
    at_once = max(1, min(AT_ONCE, _BEST_AT_ONCE // k))
    for top in range(0, len(queries_ND), at_once):
        queries_nD = queries_ND[top : top + at_once]
        products = choose_products(queries_nD, bank_MD, precise)
        if products is None:
            check_finite(queries=queries_ND, bank=bank_MD)
            return None
        found = _candidates(products, len(queries_nD), len(bank_MD), k, banned_M)
        score_nk, index_nk = score_Nk[top : top + at_once], index_Nk[top : top + at_once]

        def order(
            of_strip: tuple[slice, list[_Candidates]], queries_nD=queries_nD, score_nk=score_nk, index_nk=index_nk
        ) -> None:
            rows, parts = of_strip
            _order(queries_nD[rows], bank_MD, _merged(parts), score_nk[rows], index_nk[rows])

        complete = [(rows, parts) for rows, parts in found if not _any_full(parts)]
        # Without the compiled loop exact scores are given to threads themselves.
        in_threads(order, complete, threads=None if cpu_scans.multipliable(queries_nD, bank_MD) else 1)
        for rows in [rows for rows, parts in found if _any_full(parts)]:
            again = topk(queries_nD[rows], bank_MD, k, allowed_M, in_float64, precise=True) if products.coarse else None
            if again is None:
                again = in_float64(queries_nD[rows], bank_MD, allowed_M)
            score_nk[rows], index_nk[rows] = again
        del products, found, complete, order  # before the next queries' take their place
    return score_Nk, index_Nk


class _Candidates:
    """What may be among the k best of a strip's queries, of the bank rows seen so far."""

    def __init__(self, error_r: np.ndarray, k: int) -> None:
        self.error_r = error_r
        self.best_rk = np.full((len(error_r), k), -np.inf, dtype=np.float32)
        self.most = len(error_r) * max(4 * k + 64, _KEPT)
        self.number = 0
        self.kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """Row of the strip, row of the bank, score."""
        self.full = False
        """There were too many."""

    def look(self, columns: range, scores_rm: np.ndarray) -> None:
        """Take in scores of some bank rows; those of rows left out are −inf."""
        if self.full:
            return
        most = len(scores_rm) * (4 * self.best_rk.shape[1] + 64) + len(columns)
        find_best = cpu_scans.find_best if cpu_scans.available() else numpy_scans.find_best
        found = find_best(scores_rm, self.error_r, self.best_rk, most)
        if found is None:
            self.give_up()
            return
        # Copies, as what was found are views of memory for much more.
        self.kept.append((found[0].astype(np.int64), found[1].astype(np.int64) + columns.start, found[2].copy()))
        self.number += len(found[0])
        if self.number > self.most:
            self.kept = [self.reaching(below(self.best_rk[:, -1], self.error_r))]
            self.number = len(self.kept[0][0])
            if self.number > self.most:
                self.give_up()

    def give_up(self) -> None:
        """Keep nothing."""
        self.full = True
        self.kept.clear()

    def reaching(self, floor_r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the candidates whose score is at least their row's floor."""
        row_c, column_c, score_c = (np.concatenate(parts) for parts in zip(*self.kept, strict=True))
        keep = score_c >= floor_r[row_c]
        return row_c[keep], column_c[keep], score_c[keep]


def _candidates(
    products: Products, queries: int, bank: int, k: int, banned_M: np.ndarray | None
) -> list[tuple[slice, list[_Candidates]]]:
    """Return each strip with its candidates, those of each part of the columns by themselves."""
    found: dict[tuple[int, int], dict[int, _Candidates]] = {}

    def look(rows: slice, part: int, columns: range, scores_rm: np.ndarray) -> None:
        if banned_M is not None:
            scores_rm[:, banned_M[columns.start : columns.stop]] = -np.inf
        own = found.setdefault((rows.start, rows.stop), {})
        if part not in own:
            own[part] = _Candidates(products.error_N[rows], k)
        own[part].look(columns, scores_rm)

    for _ in sweep(products, queries, bank, look):
        pass
    return [(slice(*rows), list(parts.values())) for rows, parts in found.items()]


def _any_full(parts: Sequence[_Candidates]) -> bool:
    return any(part.full for part in parts)


def _merged(parts: Sequence[_Candidates]) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of a strip's candidates, rows in ascending order."""
    k = parts[0].best_rk.shape[1]
    best = np.concatenate([part.best_rk for part in parts], axis=1)
    kth_r = best[:, -1] if len(parts) == 1 else np.partition(best, -k, axis=1)[:, -k]
    floor_r = below(kth_r, parts[0].error_r)
    row_c, column_c, _ = (np.concatenate(one) for one in zip(*(p.reaching(floor_r) for p in parts), strict=True))
    order = row_c.argsort(kind="stable")
    return row_c[order], column_c[order]


def _order(
    queries_rD: torch.Tensor,
    bank_MD: torch.Tensor,
    candidates: tuple[np.ndarray, np.ndarray],
    score_rk: torch.Tensor,
    index_rk: torch.Tensor,
) -> None:
    """Write the k best of each row's candidates, best first."""
    row_c, column_c = candidates
    rows, k = score_rk.shape
    if cpu_scans.multipliable(queries_rD, bank_MD):
        starts = np.concatenate([[0], np.bincount(row_c, minlength=rows).cumsum()])
        queries, bank = queries_rD.detach().numpy(), bank_MD.detach().numpy()
        found = cpu_scans.order_best(queries, bank, starts, column_c, k)
    else:
        exact_c = exact_pairs(queries_rD, bank_MD, torch.from_numpy(row_c), torch.from_numpy(column_c)).numpy()
        order = np.lexsort((column_c, -exact_c, row_c))
        order = order[place_in_row(row_c[order]) < k]
        found = exact_c[order].reshape(rows, k), column_c[order].reshape(rows, k)
    for out_rk, values in zip((score_rk, index_rk), found, strict=True):
        out_rk.copy_(torch.from_numpy(values))
