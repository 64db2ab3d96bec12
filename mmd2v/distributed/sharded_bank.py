"""Exact retrieval from a bank whose rows lie on several ranks: no rank holds, or sends, more of it than its own.

Every rank must call these, with the same queries and its own part of the bank, which may be empty; the rows of the
whole are numbered in rank order. Results are those of one process that holds the whole bank, to the last bit.

Shapes: N queries, m rows of this rank's part of the bank, M of the whole, D width, P positive pairs of all ranks.
"""

from __future__ import annotations

import numpy as np
import torch

from mmd2v.distributed.collectives import gather_objects, gather_variable, rank
from mmd2v_kernels import Best, RankCounts, best_positives, cosine_topk, count_ahead

__all__ = ["sharded_rank_counts", "sharded_topk"]

_NO_INDEX = torch.iinfo(torch.int64).max


def sharded_topk(queries_ND: torch.Tensor, bank_mD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(scores float64 [N, k], index int64 [N, k])`` of each query's k nearest rows of the whole bank.

    What travels between ranks are the k best of each. Raises ValueError, on every rank, as `cosine_topk` does.
    """
    first, total = _place(bank_mD)
    if not 1 <= k <= total:
        raise ValueError(f"k: expected 1..{total} (the rows of the bank), found {k}")
    n, own = len(queries_ND), min(k, len(bank_mD))
    scores_Nk = queries_ND.new_full((n, k), -torch.inf, dtype=torch.float64)
    index_Nk = torch.full((n, k), _NO_INDEX, device=queries_ND.device)
    if own:
        scores_Nk[:, :own], found_No = cosine_topk(queries_ND, bank_mD, own)
        index_Nk[:, :own] = found_No + first
    # Rows of one query from all ranks beside each other.
    scores_NR, index_NR = (gather_variable(part.t().contiguous()).t().cpu() for part in (scores_Nk, index_Nk))
    order_NR = torch.from_numpy(np.lexsort((index_NR.numpy(), -scores_NR.numpy()), axis=1))[:, :k]
    device = queries_ND.device
    return scores_NR.gather(1, order_NR).to(device), index_NR.gather(1, order_NR).to(device)


def sharded_rank_counts(queries_ND: torch.Tensor, bank_mD: torch.Tensor, positives_P2: torch.Tensor) -> RankCounts:
    """Return the `RankCounts` of the queries against the whole bank, the same on every rank.

    ``positives_P2`` are pairs of (query, row of the whole bank), the same on every rank. What travels between ranks are
    the best positives and the counts. Raises ValueError as `mmd2v_kernels.rank_count` does.
    """
    first, total = _place(bank_mD)
    column_P = positives_P2[:, 1]
    if len(column_P) and not 0 <= int(column_P.min()) <= int(column_P.max()) < total:
        span = f"{int(column_P.min())}..{int(column_P.max())}"
        raise ValueError(f"positives: column indices span {span}, expected 0..{total - 1}")
    is_own_P = (column_P >= first) & (column_P < first + len(bank_mD))
    own_p2 = positives_P2[is_own_P] - torch.tensor([0, first], device=positives_P2.device)
    n, device = len(queries_ND), queries_ND.device
    best = Best(
        torch.full((n,), torch.inf, dtype=torch.float64, device=device), torch.full((n,), _NO_INDEX, device=device)
    )
    if len(bank_mD):
        best = best_positives(queries_ND, bank_mD, own_p2)
    best = _best_of_all(best, first)
    counts_3N, counts_3m = (torch.zeros(3, size, dtype=torch.int64, device=device) for size in (n, 0))
    if len(bank_mD):
        here = Best(best.score, torch.where(best.index == _NO_INDEX, best.index, best.index - first))
        counts_3N, counts_3m = count_ahead(queries_ND, bank_mD, own_p2, row_best=here)
    return RankCounts(gather_variable(counts_3N[None]).sum(0), gather_variable(counts_3m.t().contiguous()).t())


def _place(bank_mD: torch.Tensor) -> tuple[int, int]:
    """Return the number of this rank's first row, and of all rows."""
    sizes: list[int] = gather_objects(len(bank_mD))
    return sum(sizes[: rank()]), sum(sizes)


def _best_of_all(own: Best, first: int) -> Best:
    """Return the best of all ranks' best positives, by score, then lowest row of the whole bank."""
    has_one = own.index != _NO_INDEX
    index_RN = gather_variable(torch.where(has_one, own.index + first, own.index)[None])
    score_RN = gather_variable(torch.where(has_one, own.score, -torch.inf)[None])
    score_N = score_RN.amax(0)
    index_N = index_RN.masked_fill(score_RN < score_N, _NO_INDEX).amin(0)
    return Best(score_N.masked_fill(index_N == _NO_INDEX, torch.inf), index_N)
