"""The k nearest bank rows of every query, exactly, without keeping the N×M matrix.

The reference form takes float64 products; `cosine_topk_segmented` on the CPU and `cosine_topk_triton` on a GPU take
faster ones and give the same result.

Shapes: N queries, M bank rows, D width, n and m one block of them.
"""

from __future__ import annotations

import torch

from mmd2v_kernels import fast_products
from mmd2v_kernels.dispatch import choose
from mmd2v_kernels.retrieval_order import check_finite, check_shapes, exact_pairs, product_error

_LARGEST_K = 128
"""Of the kernels."""


def cosine_topk(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    *,
    allowed_M: torch.Tensor | None = None,
    block_rows: int = 1024,
    block_columns: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(scores float64 [N, k], index int64 [N, k])`` of each query's k nearest bank rows, nearest first.

    The rows are expected L2-normalised, so that their dot product is the cosine; the order is by score, then lowest
    index (`retrieval_order`). ``allowed_M`` (bool) leaves bank rows out. The bank may be in host memory, or mapped into
    it, while the queries are on a device: it is then copied there in blocks. Memory beyond the inputs and the result:
    blocks of scores and their candidates; on the CPU also 16-bit integers of up to 32,768 queries and a block of the
    bank.
    Raises ValueError unless 1 <= k <= the rows that may be found and the embeddings are finite and of one width.
    """
    check_shapes(queries_ND, bank_MD)
    if bank_MD.device != queries_ND.device and bank_MD.device.type != "cpu":
        raise ValueError(f"queries are on {queries_ND.device}, but the bank is on {bank_MD.device}")
    number = len(bank_MD)
    if allowed_M is not None:
        if allowed_M.dtype != torch.bool or allowed_M.shape != (number,):
            found = f"{allowed_M.dtype} {list(allowed_M.shape)}"
            raise ValueError(f"allowed_M: expected bool [{number}], found {found}")
        number = int(allowed_M.sum())
    if not 1 <= k <= number:
        of = "the rows of the bank" if allowed_M is None else "the rows of the bank that may be found"
        raise ValueError(f"k: expected 1..{number} ({of}), found {k}")
    obstacles = {"segmented": fast_products.obstacle(queries_ND, bank_MD)}
    if torch.float64 in (queries_ND.dtype, bank_MD.dtype):
        obstacles["triton"] = "the kernels have no float64"
    elif k > _LARGEST_K:
        obstacles["triton"] = f"k is over {_LARGEST_K}"
    obstacles = {path: reason for path, reason in obstacles.items() if reason is not None}
    path = choose("cosine_topk", queries_ND.device, queries_ND.dtype, rows=len(queries_ND), obstacles=obstacles).path

    def in_float64(
        queries_nD: torch.Tensor, bank_mD: torch.Tensor, allowed_m: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _float64_topk(queries_nD, bank_mD, k, allowed_m, block_rows, block_columns)

    if path == "triton":
        from mmd2v_kernels.cosine_topk_triton import topk

        return topk(queries_ND, bank_MD, k, allowed_M, in_float64)
    if path == "segmented":
        from mmd2v_kernels.cosine_topk_segmented import topk

        found = topk(queries_ND, bank_MD, k, allowed_M, in_float64)
        if found is not None:
            return found
    check_finite(queries=queries_ND, bank=bank_MD)
    return in_float64(queries_ND, bank_MD, allowed_M)


def _float64_topk(
    queries_ND: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    allowed_M: torch.Tensor | None,
    block_rows: int,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and index of the k best, or of all there are with −inf behind them."""
    scores = queries_ND.new_full((len(queries_ND), k), -torch.inf, dtype=torch.float64)
    index = queries_ND.new_zeros(len(queries_ND), k, dtype=torch.int64)
    allowed = None if allowed_M is None else allowed_M.to(bank_MD.device).nonzero()[:, 0]
    number = min(k, len(bank_MD) if allowed is None else len(allowed))
    if number == 0:
        return scores, index
    error_N = product_error(queries_ND, bank_MD)
    for top in range(0, len(queries_ND), block_rows):
        rows = slice(top, top + block_rows)
        scores[rows, :number], index[rows, :number] = _block_topk(
            queries_ND[rows], bank_MD, number, error_N[rows, None], allowed, block_columns
        )
    return scores, index


def _block_topk(
    queries_nD: torch.Tensor,
    bank_MD: torch.Tensor,
    k: int,
    error_n1: torch.Tensor,
    allowed: torch.Tensor | None,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk the bank in blocks, keeping the exact k best pairs of every query seen so far."""
    n, device = len(queries_nD), queries_nD.device
    wide_nD = queries_nD.double()
    row = column = torch.zeros(0, dtype=torch.int64, device=device)
    score = wide_nD.new_zeros(0)
    kth_n1 = torch.full_like(error_n1, -torch.inf)
    for left in range(0, len(bank_MD) if allowed is None else len(allowed), block_columns):
        block = slice(left, left + block_columns) if allowed is None else allowed[left : left + block_columns]
        bank_mD = bank_MD[block].to(device)
        scores_nm = wide_nD @ bank_mD.double().t()
        # A bank row among the k best is no worse than the k-th best so far, nor than the k-th of its own block.
        floor_n1 = kth_n1 - error_n1
        if scores_nm.shape[1] >= k:
            floor_n1 = torch.maximum(floor_n1, scores_nm.topk(k, sorted=False).values.amin(1, True) - 2 * error_n1)
        new_row, new_column = (scores_nm >= floor_n1).nonzero(as_tuple=True)
        # Kept pairs come first, so that equal scores stay ordered by index through the stable sorts.
        score = torch.cat([score, exact_pairs(queries_nD, bank_mD, new_row, new_column)])
        new_column = new_column + left if allowed is None else allowed.to(device)[left + new_column]
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
