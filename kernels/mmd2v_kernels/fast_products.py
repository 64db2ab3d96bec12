"""The fast products of the CPU paths of `rank_count` and `cosine_topk`, a bound on their error, and passes over them.

Numpy's library multiplies in fp32; or rows rounded to 16-bit integers are multiplied (int16_products.c) where a
processor does that faster and there are enough queries for a bank's rounding to pay. A thread multiplies a strip of
queries with a piece of the bank by itself and looks at the scores while they are in its cache: threads that share one
product would wait for one another at the end of each.

Shapes: N queries, M bank rows, D width; r rows of a strip and m columns of a piece of scores.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from mmd2v_kernels import cpu_scans
from mmd2v_kernels.cpu_scans import BANK_PANEL, QUERY_PANEL
from mmd2v_kernels.exact_pairs_cpu import in_threads

__all__ = ["AT_ONCE", "Products", "choose_products", "obstacle", "sweep"]

AT_ONCE = 1 << 15
"""Queries whose state is kept while the bank goes by: 50 MB of 16-bit integers at width 768."""
BLOCK_COLUMNS, PIECE_COLUMNS = 8192, 2048
"""Bank rows that are made ready at once, and of them the columns of a piece of scores."""
STRIP_FP32, STRIP_INT16 = 1024, 192
"""Queries of a piece of scores: fewer of fp32 multiply more slowly, and so many of 16 bits stay in a core's cache."""
ENOUGH_QUERIES = 256
"""Below, rounding the bank costs what its faster products save: measured to be even at 128, width 768."""
_READY_ROWS = 1024
"""At a time, of a whole number of panels."""
_WIDEST_INT16 = 1 << 18
"""Beyond, rounding might take sums out of 32 bits."""
_COARSEST = 2.0**-9
"""Error of 16 bits, of ‖q‖‖b‖, up to which they pay: rows of width 768 with no outlier have a fifth of it."""
_ONE_THREAD = threading.Lock()
"""Of numpy's library, whose number of threads belongs to the whole process."""

T = TypeVar("T")


def obstacle(*matrices: torch.Tensor) -> str | None:
    """Say why fast products cannot come before exact ones; None: they can."""
    if any(matrix.device.type != "cpu" for matrix in matrices):
        return "its blocks are for the CPU"
    if any(matrix.dtype == torch.float64 for matrix in matrices):
        return "float64 embeddings are multiplied in float64"
    return None


class Products(Protocol):
    """Scores of some queries with any piece of a bank."""

    error_N: np.ndarray
    """float64, for each query a bound on |score − exact score| over the whole bank."""
    strip: int
    """Queries of a piece."""
    coarse: bool
    """There are products of a smaller error."""

    def ready(self, columns: range) -> Any:
        """Make bank rows ready for `scores`."""

    def scores(self, rows: slice, ready: Any, columns: slice, out: np.ndarray) -> np.ndarray:
        """Return fp32 scores [r, m] of a strip with columns of what was made ready, in the memory of ``out``."""

    def threads(self) -> int:
        """Return how many threads may ask for scores at once."""

    def alone(self) -> AbstractContextManager:
        """Return what makes each product run on the thread that asks for it."""


def choose_products(queries_ND: torch.Tensor, bank_MD: torch.Tensor, precise: bool = False) -> Products | None:
    """Return the products to use; None: their sums might leave fp32's range, or values are not finite.

    ``precise`` asks for those of the smaller error, where too many scores were close to a threshold.
    """
    queries_ND, bank_MD = queries_ND.detach(), bank_MD.detach()
    enough = len(queries_ND) >= ENOUGH_QUERIES and queries_ND.shape[1] <= _WIDEST_INT16
    if enough and not precise and cpu_scans.multiplies_int16_faster():
        rounded = _Int16Products(queries_ND, bank_MD)
        if rounded.pays:
            return rounded
    return _Fp32Products.of(queries_ND, bank_MD)


def sweep(
    products: Products, rows: int, columns: int, look: Callable[[slice, int, range, np.ndarray], T]
) -> Iterator[list[T]]:
    """Yield, one block of bank rows after the other, what ``look`` returned of its pieces.

    ``look(rows, part, columns, scores_rm)`` is called by several threads, but by one at a time for each pair of rows
    and part. With few queries there are several parts, each some of the columns.
    """
    strips = [slice(top, min(top + products.strip, rows)) for top in range(0, rows, products.strip)]
    threads = products.threads()
    parts = max(1, -(-2 * threads // len(strips)))
    memory: list[np.ndarray] = []

    for left in range(0, columns, BLOCK_COLUMNS):
        block = range(left, min(left + BLOCK_COLUMNS, columns))
        ready = products.ready(block)
        of_part = -(-len(block) // parts // BANK_PANEL) * BANK_PANEL if parts > 1 else len(block)

        def job(strip_and_part: tuple[slice, int], block=block, ready=ready, of_part=of_part) -> list[T]:
            strip, part = strip_and_part
            try:
                out = memory.pop()
            except IndexError:
                out = np.empty(min(products.strip, rows) * min(PIECE_COLUMNS, columns), dtype=np.float32)
            found = []
            end = min((part + 1) * of_part, len(block))
            for first in range(part * of_part, end, PIECE_COLUMNS):
                piece = slice(first, min(first + PIECE_COLUMNS, end))
                scores_rm = products.scores(strip, ready, piece, out)
                found.append(look(strip, part, range(block.start + piece.start, block.start + piece.stop), scores_rm))
            memory.append(out)
            return found

        with products.alone():
            done = in_threads(job, [(strip, part) for part in range(parts) for strip in strips], threads)
        yield [one for found in done for one in found]


class _Fp32Products:
    """By numpy's library."""

    coarse = False

    def __init__(self, queries_ND: torch.Tensor, bank_MD: torch.Tensor, error_N: np.ndarray) -> None:
        self._queries_ND, self._bank_MD, self.error_N = queries_ND, bank_MD, error_N
        self.strip = STRIP_FP32

    @classmethod
    def of(cls, queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> _Fp32Products | None:
        """Return the products, or None where a sum might leave fp32's range."""
        error_N = _error_of_fp32(queries_ND, bank_MD)
        return None if error_N is None else cls(queries_ND, bank_MD, error_N.numpy())

    def ready(self, columns: range) -> np.ndarray:
        return self._bank_MD[columns.start : columns.stop].float().numpy()

    def scores(self, rows: slice, ready: np.ndarray, columns: slice, out: np.ndarray) -> np.ndarray:
        queries_rD, bank_mD = self._queries_ND[rows].float().numpy(), ready[columns]
        scores_rm = out[: len(queries_rD) * len(bank_mD)].reshape(len(queries_rD), len(bank_mD))
        return np.matmul(queries_rD, bank_mD.T, out=scores_rm)

    def threads(self) -> int:
        return torch.get_num_threads() if _limits_threads() else 1

    def alone(self) -> AbstractContextManager:
        return _one_thread() if _limits_threads() else nullcontext()


def _limits_threads() -> bool:
    """Tell whether numpy's library can be held to one thread: a machine for the kernels alone need not have it."""
    return importlib.util.find_spec("threadpoolctl") is not None


@contextmanager
def _one_thread() -> Iterator[None]:
    with _ONE_THREAD, _thread_pools().limit(limits=1, user_api="blas"):
        yield


@cache
def _thread_pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class _Int16Products:
    """By rows rounded to 16-bit integers."""

    coarse = True

    def __init__(self, queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> None:
        self._bank_MD = bank_MD
        self._queries = _rounded(queries_ND, QUERY_PANEL)
        self.strip = STRIP_INT16
        bank = _rounded(bank_MD, BANK_PANEL, values=False)
        # |q·b − q̃·b̃| ≤ ‖q − q̃‖‖b‖ + ‖q̃‖‖b − b̃‖; the sums are exact, and scaling them rounds three times.
        norm_N, lost_N, longest, largest_lost = self._queries.norm, self._queries.lost, bank.norm.max(), bank.lost.max()
        with np.errstate(invalid="ignore"):  # of what is not finite the error is not either
            roundings = 2.0**-22 * (norm_N + lost_N) * (longest + largest_lost)
            self.error_N = 1.001 * (lost_N * longest + (norm_N + lost_N) * largest_lost + roundings)
            small = self.error_N <= _COARSEST * norm_N * longest
            self.pays = bool((small & np.isfinite(self.error_N)).all())
            """No row has a number so large beside its others that it does not fit or little is left of them."""

    def ready(self, columns: range) -> cpu_scans.Rounded:
        return _rounded(self._bank_MD[columns.start : columns.stop], BANK_PANEL)

    def scores(self, rows: slice, ready: cpu_scans.Rounded, columns: slice, out: np.ndarray) -> np.ndarray:
        return cpu_scans.multiply(self._queries, rows, ready, columns, out)

    def threads(self) -> int:
        return torch.get_num_threads()

    def alone(self) -> AbstractContextManager:
        return nullcontext()


def _rounded(matrix: torch.Tensor, panel: int, values: bool = True) -> cpu_scans.Rounded:
    found = cpu_scans.Rounded.empty(*matrix.shape, panel, values)

    def round_rows(top: int) -> None:
        rows = matrix[top : top + _READY_ROWS].float().contiguous()
        cpu_scans.quantise(rows.numpy(), panel, found, top)

    in_threads(round_rows, range(0, len(matrix), _READY_ROWS))
    return found


def _error_of_fp32(queries_ND: torch.Tensor, bank_MD: torch.Tensor) -> torch.Tensor | None:
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
    norms = [torch.linalg.vector_norm(rows.float(), dim=1) for rows in matrix.split(_READY_ROWS)]
    return torch.cat(norms).double() * (1 + (width + 2) * 2.0**-24) + math.sqrt(width) * 2.0**-62
