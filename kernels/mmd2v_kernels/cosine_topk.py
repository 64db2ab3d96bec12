"""The k nearest bank rows of every query, exactly, without keeping the N×M matrix.

This is the float64 reference form. Shapes: N queries, M bank rows, D width, n and m one block of them.
"""

from __future__ import annotations

import torch

from mmd2v_kernels.retrieval_order import check_embeddings, exact_pairs, product_error


def cosine_topk(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    *,
    block_rows: int = 1024,
    block_columns: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(scores float64 [N, k], index int64 [N, k])`` of each query's k nearest bank rows, nearest first.

    The rows are expected L2-normalised, so that their dot product is the cosine; the order is by score, then lowest
    index (`retrieval_order`). Memory beyond the inputs and the result: one block of scores and its candidates.
    Raises ValueError unless 1 <= k <= M and the embeddings are finite and of one width.
    """
    check_embeddings(queries_ND, bank_MD)
    if not 1 <= k <= len(bank_MD):
        raise ValueError(f"k: expected 1..{len(bank_MD)} (the rows of the bank), found {k}")
    scores = queries_ND.new_empty(len(queries_ND), k, dtype=torch.float64)
    index = queries_ND.new_empty(len(queries_ND), k, dtype=torch.int64)
    error_N = product_error(queries_ND, bank_MD)
    for top in range(0, len(queries_ND), block_rows):
        rows = slice(top, top + block_rows)
        scores[rows], index[rows] = _block_topk(queries_ND[rows], bank_MD, k, error_N[rows, None], block_columns)
    return scores, index


def _block_topk(
    queries_nD: torch.Tensor, bank_MD: torch.Tensor, k: int, error_n1: torch.Tensor, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk the bank in blocks, keeping the exact k best pairs of every query seen so far."""
    n = len(queries_nD)
    wide_nD = queries_nD.double()
    row = column = wide_nD.new_zeros(0, dtype=torch.int64)
    score = wide_nD.new_zeros(0)
    kth_n1 = torch.full_like(error_n1, -torch.inf)
    for left in range(0, len(bank_MD), block_columns):
        scores_nm = wide_nD @ bank_MD[left : left + block_columns].double().t()
        # A bank row among the k best is no worse than the k-th best so far, nor than the k-th of its own block.
        floor_n1 = kth_n1 - error_n1
        if scores_nm.shape[1] >= k:
            floor_n1 = torch.maximum(floor_n1, scores_nm.topk(k, sorted=False).values.amin(1, True) - 2 * error_n1)
        new_row, new_column = (scores_nm >= floor_n1).nonzero(as_tuple=True)
        new_column = new_column + left
        # Kept pairs come first, so that equal scores stay ordered by index through the stable sorts.
        score = torch.cat([score, exact_pairs(queries_nD, bank_MD, new_row, new_column)])
        row, column = torch.cat([row, new_row]), torch.cat([column, new_column])
        order = score.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        sizes_n = torch.bincount(row, minlength=n)
        starts_n = sizes_n.cumsum(0) - sizes_n
        place = torch.arange(len(order), device=order.device) - starts_n[row[order]]
        order = order[place < k]
        row, column, score = row[order], column[order], score[order]
        if left + block_columns >= k:
            kth_n1 = score.view(n, k)[:, -1:]
    return score.view(n, k), column.view(n, k)
