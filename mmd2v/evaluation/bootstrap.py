"""Confidence intervals of recall by resampling images, each with its captions.

The images and captions that are searched stay the whole set, so ranks are computed once; what is drawn anew is which
queries are averaged over. Captions of one picture succeed and fail together: drawing them one by one would give
intervals that are too narrow.

Shapes: Q queries, U images, K recalls, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 1 << 21  # images


@dataclass(frozen=True)
class Bootstrap:
    """How often and from which seed."""

    resamples: int = 1000
    seed: int = 0


def recall_intervals(
    sides: Mapping[str, tuple[np.ndarray, np.ndarray]], images: int, bootstrap: Bootstrap
) -> dict[str, np.ndarray]:
    """Return, for each side, the percentile interval [2, K] (low, high) of the mean of each column.

    ``sides`` is a name → (hits bool [Q, K], image int64 [Q] of each query, from 0 to ``images`` - 1). All sides see the
    same resamples.
    """
    rng = np.random.default_rng(bootstrap.seed)
    described = np.unique(np.concatenate([image_Q for _, image_Q in sides.values()]))
    place = np.full(images, -1)
    place[described] = np.arange(len(described))
    units = len(described)
    sums = {
        name: _sums(np.column_stack([hits_QK, np.ones(len(hits_QK))]), place[image_Q], units)
        for name, (hits_QK, image_Q) in sides.items()
    }
    means: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    chunk = max(1, _DRAWN_AT_ONCE // units)
    for start in range(0, bootstrap.resamples, chunk):
        rows = min(chunk, bootstrap.resamples - start)
        drawn = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        times_RU = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)
        for name, sums_UK in sums.items():
            totals = times_RU @ sums_UK
            means[name].append(totals[:, :-1] / totals[:, -1:])
    tail = (1 - CONFIDENCE) / 2
    return {name: np.quantile(np.concatenate(parts), [tail, 1 - tail], axis=0) for name, parts in means.items()}


def _sums(values_QK: np.ndarray, unit_Q: np.ndarray, units: int) -> np.ndarray:
    """Sum of the queries of each image, float64 [U, K]."""
    return np.stack([np.bincount(unit_Q, weights=column, minlength=units) for column in values_QK.T], axis=1)
