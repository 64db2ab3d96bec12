"""Which data set of a mixture a global index belongs to, and how far that set has come: closed forms, no state.

Shapes: K sets, Q samples of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from mmd2v.data.cursor import Cursor, Position
from mmd2v.data.draws import permutation
from mmd2v.errors import UserError

BLOCK = 65_536
"""Samples of a block of a weighted mixture, Q: every block has each set's share exactly."""


class Mixture(ABC):
    """Assigns every global index to a set."""

    @abstractmethod
    def locate(self, index: int) -> tuple[int, int]:
        """Return (set, how many samples of this set come before) of a global index."""

    @abstractmethod
    def used(self, index: int) -> list[int]:
        """How many samples of each set come before a global index."""


class SingleSet(Mixture):
    """One set alone."""

    def locate(self, index: int) -> tuple[int, int]:
        """See `Mixture.locate`."""
        return 0, index

    def used(self, index: int) -> list[int]:
        """See `Mixture.used`."""
        return [index]


class RoundRobin(Mixture):
    """One whole batch a data set, in turn (the source's way)."""

    def __init__(self, sets: int, batch: int) -> None:
        """Args: ``sets``, K; ``batch``, samples of a step over all ranks."""
        self.sets, self.batch = sets, batch

    def locate(self, index: int) -> tuple[int, int]:
        """See `Mixture.locate`."""
        step, within = divmod(index, self.batch)
        turn, chosen = divmod(step, self.sets)
        return chosen, turn * self.batch + within

    def used(self, index: int) -> list[int]:
        """See `Mixture.used`."""
        step, within = divmod(index, self.batch)
        turn, chosen = divmod(step, self.sets)
        whole = [(turn + (k < chosen)) * self.batch for k in range(self.sets)]
        whole[chosen] += within
        return whole


class Weighted(Mixture):
    """Every block of Q samples has the same number of each set's, in an order drawn anew a block."""

    def __init__(self, weights: Mapping[str, float], seed: int, block: int = BLOCK) -> None:
        """Args: ``weights``, name → share, of any sum; ``seed``, of the order; ``block``, Q.

        Raises:
            UserError: a set's share is less than half a sample of a block.
        """
        self.seed, self.block = seed, block
        self.quotas_K = quotas(list(weights.values()), block)
        for name, quota in zip(weights, self.quotas_K, strict=True):
            if quota == 0:
                raise UserError(
                    f"data.train.sets.{name}.weight: its share of the mixture is less than one sample in {block:,}; "
                    "raise it or leave the set out"
                )
        self._sets_of_block = lru_cache(maxsize=2)(self._draw)  # a batch may straddle two blocks

    def __getstate__(self) -> dict[str, object]:
        # The cache holds a bound method, which does not travel to a spawned process.
        return {k: v for k, v in self.__dict__.items() if k != "_sets_of_block"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._sets_of_block = lru_cache(maxsize=2)(self._draw)

    def locate(self, index: int) -> tuple[int, int]:
        """See `Mixture.locate`."""
        number, within = divmod(index, self.block)
        sets_Q, before_Q = self._sets_of_block(number)
        chosen = int(sets_Q[within])
        return chosen, number * int(self.quotas_K[chosen]) + int(before_Q[within])

    def used(self, index: int) -> list[int]:
        """See `Mixture.used`."""
        number, within = divmod(index, self.block)
        sets_Q, _ = self._sets_of_block(number)
        counts = np.bincount(sets_Q[:within], minlength=len(self.quotas_K))
        return (number * self.quotas_K + counts).tolist()

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [Q] set of each place of a block, and int32 [Q] how many of the same set come before in it."""
        sets_Q = np.repeat(np.arange(len(self.quotas_K), dtype=np.int32), self.quotas_K)
        sets_Q = sets_Q[permutation(self.block, "order of sets", self.seed, number)]
        before_Q = np.empty(self.block, np.int32)
        for chosen, quota in enumerate(self.quotas_K.tolist()):
            before_Q[sets_Q == chosen] = np.arange(quota)
        return sets_Q, before_Q


def quotas(weights: Sequence[float], block: int) -> np.ndarray:
    """int64 [K]: a block divided by weight, largest remainders first, so that the sum is exact."""
    shares_K = np.asarray(weights, np.float64) / np.sum(weights) * block
    whole_K = np.floor(shares_K).astype(np.int64)
    order = np.argsort(-(shares_K - whole_K), kind="stable")
    whole_K[order[: block - int(whole_K.sum())]] += 1
    return whole_K


class TrainOrder:
    """The training stream over all sets: global index → `Position`."""

    def __init__(self, mixture: Mixture, cursors: Sequence[Cursor], names: Sequence[str]) -> None:
        """One cursor and name a set."""
        self.mixture, self.cursors, self.names = mixture, list(cursors), list(names)

    def __getitem__(self, index: int) -> Position:
        """Locate the sample with a global index."""
        chosen, own = self.mixture.locate(index)
        return self.cursors[chosen][own]._replace(set=chosen)

    def epochs(self, index: int) -> dict[str, float]:
        """How often each set has been gone through before a global index."""
        used = self.mixture.used(index)
        return {
            name: own / cursor.epoch_length for name, own, cursor in zip(self.names, used, self.cursors, strict=True)
        }

    def upcoming_shards(self, indices: range, count: int) -> list[tuple[int, int]]:
        """(set, shard) of what the lanes and sets of neighbouring indices read next, at most ``count`` of each lane."""
        found: dict[tuple[int, int], None] = {}
        starts, ends = self.mixture.used(indices[0]), self.mixture.used(indices[-1] + 1)
        for chosen, (start, end) in enumerate(zip(starts, ends, strict=True)):
            cursor = self.cursors[chosen]
            # Every lane the indices touch, once or twice.
            for own in dict.fromkeys([*range(start, end, cursor.chunk), *([end - 1] if end > start else [])]):
                found |= dict.fromkeys((chosen, shard) for shard in cursor.upcoming_shards(own, count))
        return list(found)
