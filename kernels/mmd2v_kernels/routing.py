"""Which rows go to which expert, if to any, worked out on the host before anything runs.

Shapes: T rows, R rows that pass an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Route", "leave_out", "route"]


class Route(NamedTuple):
    """What `expert_mlp` takes as ``index_R`` and ``rows``."""

    index_R: torch.Tensor | None
    """int64 [R] on the device: rows ordered by expert, in their own order within one. None: they lie so already."""
    rows: list[tuple[int, int]]
    """The range of each expert in the index."""


def route(
    expert_of_row: np.ndarray, experts: int, device: torch.device | str, *, keep: np.ndarray | None = None
) -> Route:
    """Order the rows by expert. One copy to the device, which is not waited for.

    ``expert_of_row`` (integers [T]) may be in any order, as for sequences of image and text tokens side by side.
    ``keep`` (bool [T]) leaves rows out of every expert: those that stochastic depth drops cost no product then. Raises
    ValueError for an expert outside 0 … ``experts``.
    """
    if len(expert_of_row) and not 0 <= int(expert_of_row.min()) <= int(expert_of_row.max()) < experts:
        raise ValueError(
            f"expert_of_row: spans {int(expert_of_row.min())} … {int(expert_of_row.max())}, expected 0 … {experts - 1}"
        )
    index = np.argsort(expert_of_row, kind="stable")
    if keep is not None:
        index = index[keep[index]]
    stops = np.cumsum(np.bincount(expert_of_row[index], minlength=experts)).tolist()
    rows = list(zip([0, *stops[:-1]], stops, strict=True))
    if np.array_equal(index, np.arange(len(expert_of_row))):
        return Route(None, rows)
    return Route(_copied(index, device), rows)


def leave_out(rows: Sequence[tuple[int, int]], keep: np.ndarray, device: torch.device | str) -> Route:
    """Take rows that lie in order out of their experts' ranges: those that stochastic depth drops.

    ``rows`` are consecutive ranges from 0 to T, ``keep`` is bool [T]. One copy to the device, which is not waited for.
    """
    index = np.flatnonzero(keep)
    stops = np.searchsorted(index, [stop for _, stop in rows]).tolist()
    kept = list(zip([0, *stops[:-1]], stops, strict=True))
    return Route(None if len(index) == len(keep) else _copied(index, device), kept)


def _copied(index: np.ndarray, device: torch.device | str) -> torch.Tensor:
    on_host, device = torch.from_numpy(index), torch.device(device)
    if device.type == "cuda":
        return on_host.pin_memory().to(device, non_blocking=True)
    return on_host.to(device)
