"""The order of the training stream: one global index → (epoch, shard, row), with nothing to save but the index.

The stream is continuous: epoch e is indices [e · N, (e + 1) · N), and a batch may straddle two epochs. In an epoch
the shards are permuted and cut into windows of ``window`` shards; the samples of one window are permuted together.
Memory is O(shards + samples of a window).

Shapes: S shards, W windows, R samples of one window, m samples of a micro-batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmd2v.data.draws import permutation
from mmd2v.errors import UserError

_KEPT_WINDOWS = 2  # a batch may straddle two windows


class Position(NamedTuple):
    """Where the sample with one global index lies."""

    epoch: int
    shard: int
    row: int


class Cursor:
    """The order of a data set's samples in every epoch, a pure function of (counts, seed, window, index)."""

    def __init__(self, counts_S: np.ndarray, *, seed: int, window: int) -> None:
        """Take the samples of each shard (some may be 0), the seed, and how many shards are shuffled together."""
        self.counts_S = np.asarray(counts_S, np.int64)
        if self.counts_S.ndim != 1 or (self.counts_S < 0).any() or self.counts_S.sum() == 0:
            raise UserError("data: found no sample to train on")
        self.total = int(self.counts_S.sum())
        self.seed = seed
        self.window = window
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getitem__(self, index: int) -> Position:
        """Locate the sample with a global index (any index ≥ 0)."""
        epoch, offset = divmod(index, self.total)
        order_S, ends_W = self._epoch_order(epoch)
        place = int(np.searchsorted(ends_W, offset, side="right"))
        start = int(ends_W[place - 1]) if place else 0
        shards, rows = self._window_order(epoch, place, order_S)
        return Position(epoch, int(shards[offset - start]), int(rows[offset - start]))

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [S] permuted shards, and int64 [W] the epoch's offset at which each window ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            order_S = permutation(len(self.counts_S), "order of shards", self.seed, epoch)
            starts_W = np.arange(0, len(order_S), self.window)
            ends_W = np.cumsum(np.add.reduceat(self.counts_S[order_S], starts_W))
            self._epoch = (epoch, order_S, ends_W)
        return self._epoch[1], self._epoch[2]

    def _window_order(self, epoch: int, place: int, order_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 [R] shards and int32 [R] rows of one window's samples, in the order they are used."""
        key = (epoch, place)
        if key not in self._windows:
            shards = order_S[place * self.window : (place + 1) * self.window]
            counts = self.counts_S[shards]
            order_R = permutation(int(counts.sum()), "order of samples", self.seed, epoch, place)
            ends = np.cumsum(counts)
            within = np.searchsorted(ends, order_R, side="right")
            rows_R = order_R - (ends - counts)[within]
            while len(self._windows) >= _KEPT_WINDOWS:
                self._windows.popitem(last=False)
            self._windows[key] = (shards[within].astype(np.int32), rows_R.astype(np.int32))
        return self._windows[key]


def micro_batches(
    *, start_index: int, rank: int, world_size: int, micro_batch_size: int, first: int = 0, stride: int = 1
) -> Iterator[range]:
    """Yield the global indices of one rank's micro-batches, without end.

    Micro-batch j of rank r is ``start + j·W·m + r·m … + m``: with W ranks, a accumulated micro-batches and
    G = W·m·a, step t covers ``start + t·G … + G`` whatever W is.

    Args:
        start_index: global index at which the stream starts or resumes.
        rank: this rank.
        world_size: number of ranks, W.
        micro_batch_size: samples of a rank's micro-batch, m.
        first: which micro-batch to start with.
        stride: yield every ``stride``-th micro-batch (a worker's share).
    """
    place = start_index + first * world_size * micro_batch_size + rank * micro_batch_size
    while True:
        yield range(place, place + micro_batch_size)
        place += stride * world_size * micro_batch_size
