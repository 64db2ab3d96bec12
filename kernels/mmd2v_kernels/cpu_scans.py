"""The compiled loops of exact retrieval on the CPU (cpu_scans.c), where they were built; numpy does it elsewhere.

A call lets other threads run, so pieces of a block are given to as many threads as torch uses.

Shapes: N queries, M bank rows, D width, P pairs; r rows and m columns of a piece of scores, c candidates, k best.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch

__all__ = ["Above", "available", "exact_pairs", "find_above", "find_best", "multipliable", "order_best"]

_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "exact_pairs": (ctypes.c_int, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER]),
    "find_above": (_LONG, [_POINTER, _LONG, _LONG, *[_POINTER] * 8, _LONG]),
    "find_best": (_LONG, [_POINTER, _LONG, _LONG, _LONG, *[_POINTER] * 5, _LONG]),
    "order_best": (ctypes.c_int, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER]),
}


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_scans{suffix}")
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # built for another system
                continue
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    return None


def available() -> bool:
    """Return whether the loops were compiled when the package was installed."""
    return _library() is not None


def multipliable(*matrices: torch.Tensor) -> bool:
    """Return whether the loops can read these: fp32 rows in memory one after the other."""
    return available() and all(
        matrix.dtype == torch.float32 and matrix.device.type == "cpu" and matrix.is_contiguous() for matrix in matrices
    )


def exact_pairs(queries_ND: np.ndarray, bank_MD: np.ndarray, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """Return `retrieval_order.exact_dot` of pairs of rows, float64 [P]. Indices are int64 and in range."""
    scores = np.empty(len(row_P))
    row_P, column_P = np.ascontiguousarray(row_P), np.ascontiguousarray(column_P)
    _check(
        _loops().exact_pairs(
            _at(queries_ND),
            _at(bank_MD),
            queries_ND.shape[1],
            _at(row_P),
            _at(column_P),
            len(row_P),
            _at(scores),
        )
    )
    return scores


class Above:
    """What `find_above` finds in a piece of scores."""

    def __init__(self, rows: int, columns: int, most: int) -> None:
        self.row_r = np.zeros(rows, dtype=np.int32)
        """Scores of each row that are surely above its threshold."""
        self.column_m = np.zeros(columns, dtype=np.int32)
        """The same of each column."""
        self.close = np.empty((4, most), dtype=np.int32)
        self.counts = np.zeros(2, dtype=np.int64)

    def close_to(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row and column of the scores too close to the row's threshold (0) or the column's (1)."""
        number = self.counts[side]
        return self.close[2 * side, :number], self.close[2 * side + 1, :number]


def find_above(
    scores_rm: np.ndarray,
    row_bounds: tuple[np.ndarray, np.ndarray],
    column_bounds: tuple[np.ndarray, np.ndarray],
    most: int,
) -> Above | None:
    """Compare fp32 scores with two bounds of each row and each column, in one pass.

    Beyond the second bound is above, from the first up to it is close. None: ``most`` close ones would not do.
    """
    rows, columns = scores_rm.shape
    found = Above(rows, columns, most)
    full = _loops().find_above(
        _at(scores_rm),
        rows,
        columns,
        *(_at(bound) for bound in (*row_bounds, *column_bounds)),
        _at(found.row_r),
        _at(found.column_m),
        _at(found.close),
        _at(found.counts),
        most,
    )
    return None if full < 0 else found


def find_best(
    scores_rm: np.ndarray, error_r: np.ndarray, best_rk: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return row, column and score of what may be among the k best of its row; None: ``most`` would not do.

    ``error_r`` (float64) bounds the error of a row's fp32 scores. ``best_rk`` (fp32) holds the k best scores of each
    row seen so far, descending, −inf where there were none, and takes in those of this piece.
    """
    row, column = np.empty((2, most), dtype=np.int32)
    score = np.empty(most, dtype=np.float32)
    rows, columns = scores_rm.shape
    found = _loops().find_best(
        _at(scores_rm),
        rows,
        columns,
        best_rk.shape[1],
        _at(error_r),
        _at(best_rk),
        _at(row),
        _at(column),
        _at(score),
        most,
    )
    return None if found < 0 else (row[:found], column[:found], score[:found])


def order_best(
    queries_ND: np.ndarray, bank_MD: np.ndarray, starts: np.ndarray, column_c: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact scores float64 [N, k] and columns int64 [N, k] of the k best candidates, best first.

    ``starts`` (int64 [N + 1]) says where the candidates ``column_c`` (int64) of each query begin: at least k each.
    """
    rows = len(queries_ND)
    scores, columns = np.empty((rows, k)), np.empty((rows, k), dtype=np.int64)
    _check(
        _loops().order_best(
            _at(queries_ND),
            _at(bank_MD),
            queries_ND.shape[1],
            _at(starts),
            _at(column_c),
            rows,
            k,
            _at(scores),
            _at(columns),
        )
    )
    return scores, columns


def _loops() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask `available` first"
    return library


def _at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def _check(status: int) -> None:
    if status < 0:
        raise MemoryError
