"""The compiled loops of exact retrieval on the CPU (cpu_scans.c, int16_products.c), where they were built.

A call lets other threads run. Where there was no compiler, `numpy_scans` does what they do, more slowly.

Shapes: N queries, M bank rows, D width, P pairs; r rows and m columns of a piece of scores, c candidates, k best.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

__all__ = [
    "BANK_PANEL",
    "QUERY_PANEL",
    "Above",
    "Rounded",
    "available",
    "exact_pairs",
    "find_above",
    "find_best",
    "multipliable",
    "multiplies_int16_faster",
    "multiply",
    "order_best",
    "quantise",
]

QUERY_PANEL, BANK_PANEL = 4, 16
"""Rows that lie interleaved in memory, as int16_products.c multiplies them."""

_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "exact_pairs": (ctypes.c_int, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER]),
    "find_above": (_LONG, [_POINTER, _LONG, _LONG, *[_POINTER] * 8, _LONG]),
    "find_best": (_LONG, [_POINTER, _LONG, _LONG, _LONG, *[_POINTER] * 5, _LONG]),
    "multiplies_int16_faster": (ctypes.c_int, []),
    "panel_of": (_LONG, [ctypes.c_int]),
    "multiply": (None, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER]),
    "quantise": (ctypes.c_int, [_POINTER, _LONG, _LONG, _LONG, *[_POINTER] * 4]),
    "order_best": (ctypes.c_int, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER]),
}


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_scans{suffix}")
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
                for name, (result, arguments) in _SIGNATURES.items():
                    function = getattr(library, name)
                    function.restype, function.argtypes = result, arguments
            except (OSError, AttributeError):  # built for another system, or of sources that lacked a loop
                continue
            if (library.panel_of(0), library.panel_of(1)) == (QUERY_PANEL, BANK_PANEL):
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
    row seen so far, descending, −inf where there were none, and takes in those of this piece. Rows are in order.
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
    _check(found + 1)
    return None if found < 0 else (row[:found], column[:found], score[:found])


class Rounded(NamedTuple):
    """Rows as 16-bit integers, times a scale each, and what was lost."""

    values: np.ndarray | None
    """int16, in panels; None where only the errors were asked for."""
    scale: np.ndarray
    """fp32 [rows, up to a panel]; 0 for a row that is 0 or out of range."""
    norm: np.ndarray
    """float64 [rows]"""
    lost: np.ndarray
    """float64 [rows], norm of the difference."""

    @classmethod
    def empty(cls, rows: int, width: int, panel: int, values: bool) -> Rounded:
        """Return memory for so many rows, of which ``panel`` are interleaved."""
        padded = -(-rows // panel) * panel
        return cls(
            np.empty((padded, width + width % 2), dtype=np.int16) if values else None,
            np.zeros(padded, dtype=np.float32),
            np.empty(rows),
            np.empty(rows),
        )


def multiplies_int16_faster() -> bool:
    """Tell whether this processor multiplies 16-bit integers faster than fp32."""
    return available() and bool(_loops().multiplies_int16_faster())


def quantise(matrix_rD: np.ndarray, panel: int, into: Rounded, first: int) -> None:
    """Round fp32 rows to 16-bit integers; they are those of ``into`` from ``first`` on, where a panel begins."""
    at = [None if array is None else _at(array[first:]) for array in into]
    _check(_loops().quantise(_at(matrix_rD), *matrix_rD.shape, panel, *at))


def multiply(queries: Rounded, rows: slice, bank: Rounded, columns: slice, out: np.ndarray) -> np.ndarray:
    """Return fp32 scores of rows and columns that begin with a panel, in the memory of ``out``."""
    assert queries.values is not None and bank.values is not None
    number, wide = rows.stop - rows.start, columns.stop - columns.start
    scores_rm = out[: number * wide].reshape(number, wide)
    _loops().multiply(
        _at(queries.values[rows.start :]),
        _at(queries.scale[rows.start :]),
        number,
        _at(bank.values[columns.start :]),
        _at(bank.scale[columns.start :]),
        wide,
        bank.values.shape[1] // 2,
        _at(scores_rm),
    )
    return scores_rm


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
