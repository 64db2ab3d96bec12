"""What the CPU paths of `rank_count` and `cosine_topk` share: fp32 products, their error, and passes over their blocks.

torch or numpy multiplies. What compares is compiled (`cpu_scans`); where there was no compiler it is numpy, whose
comparisons run at the speed of the cache, several times that of torch's. There a block of booleans is looked at as
words of eight: words add up, eight counts at once, and most are 0.

Shapes: N queries, M bank rows, D width; n and m a block of them, r rows of a piece of a block.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["BLOCK", "BLOCK_COLUMNS", "PIECE", "Close", "error_of_fp32", "find_above", "obstacle", "product"]

BLOCK, BLOCK_COLUMNS = 1 << 24, 8192
"""Scores in memory at once (64 MB), and columns of them. Blocks of fewer rows multiply more slowly."""
PIECE = 128
"""Rows of a block that one thread looks at: at most 255, as a byte must hold their number."""
_NORM_ROWS = 1024
_FEW = 0.01
"""Share of a piece's scores that are looked at one by one."""


def obstacle(*matrices: torch.Tensor) -> str | None:
    """Say why fp32 products cannot be the fast pass; None: they can."""
    if any(matrix.device.type != "cpu" for matrix in matrices):
        return "its blocks are for the CPU"
    if any(matrix.dtype == torch.float64 for matrix in matrices):
        return "float64 embeddings are multiplied in float64"
    if torch.get_float32_matmul_precision() != "highest":
        return "torch may round the operands of fp32 products"
    return None


def error_of_fp32(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> torch.Tensor | None:
    """Return for each query a bound on |fp32 product − exact score| over the whole bank, float64 [N].

    D roundings of 2⁻²⁴ at most, in any order, each relative to Σ|q·b| ≤ ‖q‖‖b‖ (Higham, Accuracy and Stability of
    Numerical Algorithms, §3.1); what underflows adds to it. None where a sum might leave fp32's range.
    """
    norm_N = _norms(queries_ND)
    largest = _norms(bank_MD).max()
    if not float(norm_N.max() * largest) < 1e37:
        return None
    width = queries_ND.shape[1]
    return (width + 2) * 2.0**-24 * 1.001 * norm_N * largest + width * 2.0**-125


def _norms(matrix: torch.Tensor) -> torch.Tensor:
    """Return an upper bound on the norm of each row, float64 [N], from a sum of squares in fp32.

    Its roundings are bounded as those of a product are; squares that underflow add less than √D · 2⁻⁶².
    """
    width = matrix.shape[1]
    norms = [torch.linalg.vector_norm(rows.float(), dim=1) for rows in matrix.split(_NORM_ROWS)]
    return torch.cat(norms).double() * (1 + (width + 2) * 2.0**-24) + math.sqrt(width) * 2.0**-62


def product(queries_nD: torch.Tensor, bank_mD: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the fp32 scores [n, m], in the memory of ``out``.

    By torch's library or by numpy's, whichever multiplies faster here: on AMD's processors that may be either. Sums
    differ in their last bits, which the bound on the error covers.
    """
    scores_nm = out[: len(queries_nD) * len(bank_mD)].view(len(queries_nD), len(bank_mD))
    queries_nD, bank_mD = queries_nD.detach().float(), bank_mD.detach().float()
    work = scores_nm.numel() * queries_nD.shape[1]
    threads = torch.get_num_threads()
    name = _faster(threads) if work >= _TELLING else "torch"
    start = perf_counter()
    _LIBRARIES[name](queries_nD, bank_mD, scores_nm)
    if work >= _TELLING:
        _pace.setdefault((name, threads), []).append((perf_counter() - start) / work)
        del _pace[name, threads][_TRIALS:]
    return scores_nm


def _torch_product(queries_nD: torch.Tensor, bank_mD: torch.Tensor, out_nm: torch.Tensor) -> None:
    with torch.autocast("cpu", enabled=False):  # which would round the operands to bf16
        torch.mm(queries_nD, bank_mD.t(), out=out_nm)


def _numpy_product(queries_nD: torch.Tensor, bank_mD: torch.Tensor, out_nm: torch.Tensor) -> None:
    with _thread_pools().limit(limits=torch.get_num_threads(), user_api="blas"):
        np.matmul(queries_nD.numpy(), bank_mD.numpy().T, out=out_nm.numpy())


@cache
def _thread_pools() -> Any:
    """Return what holds numpy's library to torch's number of threads; without threadpoolctl it is not asked."""
    from threadpoolctl import ThreadpoolController  # here: a machine for the kernels alone need not have it

    return ThreadpoolController()


_LIBRARIES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = {"torch": _torch_product}
if importlib.util.find_spec("threadpoolctl") is not None:
    _LIBRARIES["numpy"] = _numpy_product
_TELLING = 1 << 30  # multiplications, some hundredths of a second, whose time is noted
_TRIALS = 2  # of each library, the first of which may meet memory that is new
_pace: dict[tuple[str, int], list[float]] = {}
"""(library, threads) → seconds a multiplication of its first products."""


def _faster(threads: int) -> str:
    """Return the library whose turn it is to be tried, and then the one that was faster."""
    paces = {name: _pace.get((name, threads), []) for name in _LIBRARIES}
    behind = min(paces, key=lambda name: len(paces[name]))
    return behind if len(paces[behind]) < _TRIALS else min(paces, key=lambda name: min(paces[name]))


class Close(NamedTuple):
    """What `find_above` finds."""

    row_r: np.ndarray
    """int64, scores of each row that are surely above."""
    column_m: np.ndarray
    """The same of each column."""
    rows: np.ndarray
    """Row and column of the scores that are neither surely above nor surely below."""
    columns: np.ndarray


def find_above(scores_rm: np.ndarray, low: np.ndarray, high: np.ndarray) -> Close:
    """Compare with two bounds, [r, 1] or [1, m]: beyond ``high`` is above, from ``low`` up to it is close."""
    rows, columns = scores_rm.shape
    reaches = np.zeros((rows, (columns + 7) // 8), dtype=np.int64)
    np.greater_equal(scores_rm, low, out=reaches.view(np.bool_)[:, :columns])
    row_r = _row_sums(reaches)
    if row_r.sum() <= _FEW * scores_rm.size:  # ranks are low: look at what reaches the bound one by one
        r, c = set_bytes(reaches)
        above = scores_rm[r, c] > np.broadcast_to(high, scores_rm.shape)[r, c]
        counts = (np.bincount(found[above], minlength=n) for found, n in ((r, rows), (c, columns)))
        return Close(*counts, r[~above], c[~above])
    above = np.zeros_like(reaches)
    np.greater(scores_rm, high, out=above.view(np.bool_)[:, :columns])
    column_m = above.sum(0).view(np.uint8)[:columns].astype(np.int64)
    row_r = _row_sums(above)
    np.bitwise_xor(above, reaches, out=reaches)
    return Close(row_r, column_m, *set_bytes(reaches))


def _row_sums(words: np.ndarray) -> np.ndarray:
    """Return how many bytes of each row are 1, of words that hold 0 and 1 in each byte."""
    total_r = np.zeros(len(words), dtype=np.int64)
    for first in range(0, words.shape[1], 255):  # a byte overflows beyond
        total_r += words[:, first : first + 255].sum(1).view(np.uint8).reshape(-1, 8).sum(1, dtype=np.int64)
    return total_r


def set_bytes(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of the bytes that are not 0 in [rows, words], in order."""
    flat = words.reshape(-1)
    found = (flat != 0).nonzero()[0]  # of booleans, which numpy skips several at once
    word, byte = flat[found].view(np.uint8).reshape(-1, 8).nonzero()
    at = found[word] * 8 + byte
    return at // (8 * words.shape[1]), at % (8 * words.shape[1])
