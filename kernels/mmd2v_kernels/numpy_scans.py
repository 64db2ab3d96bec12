"""What `cpu_scans` does in compiled loops, by numpy: where the package was installed without a compiler.

Numpy's comparisons run at the speed of the cache, several times that of torch's. A block of booleans is looked at as
words of eight: words add up, eight counts at once, and most are 0.

Shapes: r rows and m columns of a piece of scores, k best.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Close", "below", "find_above", "find_best", "place_in_row"]

_PIECE = 128
"""Rows at a time: at most 255, as a byte must hold their number."""
_FEW = 0.01
"""Share of a piece's scores that are looked at one by one."""
_GROUP = 8
"""Columns of a group, whose maximum stands for it."""
_LOWEST = np.finfo(np.float32).min
"""A bound that every score reaches, but not the −inf of a row that is left out."""


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
    found = []
    for top in range(0, len(scores_rm), _PIECE):
        rows = slice(top, top + _PIECE)
        bounds = (bound if len(bound) == 1 else bound[rows] for bound in (low, high))
        one = _find_above(scores_rm[rows], *bounds)
        found.append(one._replace(rows=one.rows + top))
    row_r, column_m, rows, columns = zip(*found, strict=True)
    return Close(np.concatenate(row_r), np.sum(column_m, axis=0), np.concatenate(rows), np.concatenate(columns))


def _find_above(scores_rm: np.ndarray, low: np.ndarray, high: np.ndarray) -> Close:
    rows, columns = scores_rm.shape
    reaches = np.zeros((rows, (columns + 7) // 8), dtype=np.int64)
    np.greater_equal(scores_rm, low, out=reaches.view(np.bool_)[:, :columns])
    row_r = _row_sums(reaches)
    if row_r.sum() <= _FEW * scores_rm.size:  # ranks are low: look at what reaches the bound one by one
        r, c = _set_bytes(reaches)
        above = scores_rm[r, c] > np.broadcast_to(high, scores_rm.shape)[r, c]
        counts = (np.bincount(found[above], minlength=n) for found, n in ((r, rows), (c, columns)))
        return Close(*counts, r[~above], c[~above])
    above = np.zeros_like(reaches)
    np.greater(scores_rm, high, out=above.view(np.bool_)[:, :columns])
    column_m = above.sum(0).view(np.uint8)[:columns].astype(np.int64)
    row_r = _row_sums(above)
    np.bitwise_xor(above, reaches, out=reaches)
    return Close(row_r, column_m, *_set_bytes(reaches))


def find_best(
    scores_rm: np.ndarray, error_r: np.ndarray, best_rk: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Do what `cpu_scans.find_best` does.

    Maxima of strided groups of columns give a first bound from below on the k-th best score, as each of the k best
    groups holds one score that high.
    """
    rows, columns = scores_rm.shape
    k = best_rk.shape[1]
    floor_r = np.maximum(below(best_rk[:, -1], error_r), below(_kth_at_least(scores_rm, k), error_r))
    reaches = np.zeros((rows, (columns + 7) // 8), dtype=np.int64)
    np.greater_equal(scores_rm, floor_r[:, None], out=reaches.view(np.bool_)[:, :columns])
    r, c = _set_bytes(reaches)
    if len(r) > most:
        return None
    if len(r):
        place = place_in_row(r)
        seen = np.full((rows, k + place.max() + 1), -np.inf, dtype=np.float32)
        seen[:, :k] = best_rk
        seen[r, k + place] = scores_rm[r, c]
        best_rk[:] = -np.sort(-np.partition(seen, -k, axis=1)[:, -k:], axis=1)
    return r, c, scores_rm[r, c]


def below(kth: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return twice the error below the k-th best score, rounded down; an unknown one stays the lowest."""
    known = kth > _LOWEST
    bound = (np.where(known, kth, 0) - 2 * error).astype(np.float32)
    return np.where(known, np.nextafter(bound, np.float32(-np.inf)), _LOWEST)


def place_in_row(row_c: np.ndarray) -> np.ndarray:
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


def _row_sums(words: np.ndarray) -> np.ndarray:
    """Return how many bytes of each row are 1, of words that hold 0 and 1 in each byte."""
    total_r = np.zeros(len(words), dtype=np.int64)
    for first in range(0, words.shape[1], 255):  # a byte overflows beyond
        total_r += words[:, first : first + 255].sum(1).view(np.uint8).reshape(-1, 8).sum(1, dtype=np.int64)
    return total_r


def _set_bytes(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of the bytes that are not 0 in [rows, words], in order."""
    flat = words.reshape(-1)
    found = (flat != 0).nonzero()[0]  # of booleans, which numpy skips several at once
    word, byte = flat[found].view(np.uint8).reshape(-1, 8).nonzero()
    at = found[word] * 8 + byte
    return at // (8 * words.shape[1]), at % (8 * words.shape[1])
