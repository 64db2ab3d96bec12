"""The order of the training stream: one global index → (epoch, shard, row), with nothing to save but the index.

The stream is continuous: epoch e is indices [e · E, (e + 1) · E), where E is the number of samples an epoch gives. In
an epoch the shards are permuted and laid end to end. This sequence is cut into ``lanes`` equal parts; a step takes the
same number of samples from every lane, and a lane's samples lie side by side in the step, so that a rank or node reads
its own lanes' shards and not everybody's. Inside a lane the samples of ``window`` shards at a time are permuted
together. Memory is O(shards + samples of a window).

Neither ranks nor workers enter: any number of them share one order.

Shapes: S shards, W windows of a lane, R samples of one window, L lanes, m samples of a micro-batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmd2v.data.draws import permutation
from mmd2v.errors import UserError

_KEPT_EPOCHS = 2
"""Orders of shards that are kept: a batch may straddle two epochs, and the next one's shards are fetched ahead."""


class Position(NamedTuple):
    """Where the sample with one global index lies."""

    epoch: int
    shard: int
    row: int
    set: int = 0
    """Which of the data sets of a mixture."""
    caption: int | None = None
    """The one caption that is the sample, in batches of tokens; None: the captions of the epoch."""
    mean_over: float | None = None
    """See `mmd2v.data.batch.Batch.mean_over`."""


class _Window(NamedTuple):
    """Samples that are permuted together, as places of a lane."""

    start: int
    shards_R: np.ndarray
    rows_R: np.ndarray


class Cursor:
    """The order of a data set's samples in every epoch, a pure function of (counts, seed, settings, index).

    Attributes:
        total: samples of the set.
        epoch_length: samples an epoch gives, E: ``total``, or the whole batches among them.
        chunk: samples that a step takes of each lane.
    """

    def __init__(
        self,
        counts_S: np.ndarray,
        *,
        seed: int,
        window: int,
        lanes: int = 1,
        batch: int = 1,
        drop_last: bool = False,
        spread: int = 1,
        name: str = "",
    ) -> None:
        """Describe the order.

        Args:
            counts_S: samples of each shard (some may be 0).
            seed: of the order.
            window: how many shards are shuffled together.
            lanes: L, see the top of this file; ``batch`` must be a multiple of it.
            batch: samples of a step over all ranks; matters with several lanes or ``drop_last``.
            drop_last: leave the samples that fill no whole batch out of an epoch (others each time).
            spread: consecutive indices that are looked up together, m; decides how many windows are kept.
            name: of the set in a mixture, so that equal sets of it differ in their order.

        Raises:
            UserError: no sample, fewer than a batch under ``drop_last``, or lanes that do not divide the batch.
        """
        self.counts_S = np.asarray(counts_S, np.int64)
        if self.counts_S.ndim != 1 or (self.counts_S < 0).any() or self.counts_S.sum() == 0:
            raise UserError("data: found no sample to train on")
        if batch % lanes:
            near = max(d for d in range(1, min(lanes, batch) + 1) if batch % d == 0)
            raise UserError(
                f"data.lanes: {lanes} does not divide engine.batch_size {batch}; nearest number that does: {near}"
            )
        self.total = int(self.counts_S.sum())
        self.epoch_length = self.total // batch * batch if drop_last else self.total
        if self.epoch_length == 0:
            raise UserError(f"data.last_batch: drop leaves nothing: found {self.total} samples, a batch has {batch}")
        self.seed, self.window, self.lanes = seed, window, lanes
        self._key = (name,) if name else ()
        self.chunk = batch // lanes
        self._starts_L = np.arange(lanes + 1) * self.total // lanes
        self._rounds = self.total // lanes // self.chunk
        sizes_L = np.diff(self._starts_L)
        self._rest_ends_L = np.cumsum(sizes_L - self._rounds * self.chunk)
        # A micro-batch touches this many lanes, and may straddle two windows in each.
        self._kept = 2 * self.lanes_together(lanes, self.chunk, spread)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], _Window] = OrderedDict()

    @staticmethod
    def lanes_together(lanes: int, chunk: int, spread: int) -> int:
        """Most lanes that ``spread`` consecutive indices touch when a step takes ``chunk`` samples of each."""
        return min(lanes, -(-spread // chunk) + 1)

    def __getitem__(self, index: int) -> Position:
        """Locate the sample with a global index (any index ≥ 0)."""
        epoch, offset = divmod(index, self.epoch_length)
        lane, place = self._lane(offset)
        order_S, ends_S = self._epoch_order(epoch)
        window = self._window(epoch, lane, place, order_S, ends_S)
        within = place - window.start
        return Position(epoch, int(window.shards_R[within]), int(window.rows_R[within]))

    def upcoming_shards(self, index: int, count: int) -> list[int]:
        """The shards that the lane of ``index`` reads next, its present window first, at most ``count``.

        They go on into the next epoch, for which nobody must wait either.
        """
        epoch, offset = divmod(index, self.epoch_length)
        lane, place = self._lane(offset)
        found: dict[int, None] = {}
        while len(found) < count and epoch - index // self.epoch_length < 2:
            order_S, ends_S = self._epoch_order(epoch)
            first = self._first_shard(lane, ends_S)
            at = int(np.searchsorted(ends_S, self._starts_L[lane] + place, side="right"))
            begin = first + (at - first) // self.window * self.window
            end = int(np.searchsorted(ends_S, self._starts_L[lane + 1], side="left")) + 1
            found |= dict.fromkeys(int(s) for s in order_S[begin : min(begin + count, end)] if self.counts_S[s])
            epoch, place = epoch + 1, 0
        return list(found)[:count]

    def shards_until(self, epoch: int, samples: int) -> set[int]:
        """The shards in which the first ``samples`` samples of an epoch lie."""
        batch = self.chunk * self.lanes
        turns, within = divmod(min(samples, self._rounds * batch), batch)
        rest = samples - min(samples, self._rounds * batch)
        order_S, ends_S = self._epoch_order(epoch)
        found: set[int] = set()
        for lane in range(self.lanes):
            places = turns * self.chunk + min(max(within - lane * self.chunk, 0), self.chunk)
            before = int(self._rest_ends_L[lane - 1]) if lane else 0
            places += min(max(rest - before, 0), int(self._rest_ends_L[lane]) - before)
            place = 0
            while place < places:
                window = self._window(epoch, lane, place, order_S, ends_S)
                found.update(np.unique(window.shards_R[: places - window.start]).tolist())
                place = window.start + len(window.shards_R)
        return found

    def _lane(self, offset: int) -> tuple[int, int]:
        """(lane, place in it) of an epoch's ``offset``-th sample: whole rounds over the lanes, then what is left."""
        batch = self.chunk * self.lanes
        if offset < self._rounds * batch:
            turn, within = divmod(offset, batch)
            lane, rest = divmod(within, self.chunk)
            return lane, turn * self.chunk + rest
        offset -= self._rounds * batch
        lane = int(np.searchsorted(self._rest_ends_L, offset, side="right"))
        start = int(self._rest_ends_L[lane - 1]) if lane else 0
        return lane, self._rounds * self.chunk + offset - start

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [S] permuted shards, and int64 [S] the epoch's sequence at which each of them ends."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
            order_S = permutation(len(self.counts_S), "order of shards", self.seed, epoch, *self._key)
            self._epochs[epoch] = (order_S, np.cumsum(self.counts_S[order_S]))
        return self._epochs[epoch]

    def _first_shard(self, lane: int, ends_S: np.ndarray) -> int:
        """Place, in the permuted order, of the shard in which a lane begins."""
        return int(np.searchsorted(ends_S, self._starts_L[lane], side="right")) if lane else 0

    def _window(self, epoch: int, lane: int, place: int, order_S: np.ndarray, ends_S: np.ndarray) -> _Window:
        """The window of a lane in which ``place`` lies, its samples in the order they are used."""
        first = self._first_shard(lane, ends_S)
        lane_start, lane_end = int(self._starts_L[lane]), int(self._starts_L[lane + 1])
        number = (int(np.searchsorted(ends_S, lane_start + place, side="right")) - first) // self.window
        key = (epoch, lane, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        begin = first + number * self.window
        shards = order_S[begin : begin + self.window]
        counts = self.counts_S[shards]
        ends = ends_S[begin : begin + self.window]
        # The first and the last shard of a lane may belong to it in part.
        start, end = max(lane_start, int(ends[0] - counts[0])), min(lane_end, int(ends[-1]))
        # Lane 0 keeps the key that a single lane has always had: the order of running trainings must not change.
        order_R = permutation(
            end - start, "order of samples", self.seed, epoch, *([lane] if lane else []), number, *self._key
        )
        sequence_R = order_R + start
        within = np.searchsorted(ends, sequence_R, side="right")
        rows_R = sequence_R - (ends - counts)[within]
        while len(self._windows) >= self._kept:
            self._windows.popitem(last=False)
        window = _Window(start - lane_start, shards[within].astype(np.int32), rows_R.astype(np.int32))
        self._windows[key] = window
        return window


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
