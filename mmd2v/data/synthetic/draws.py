"""Random choices that give the same answer on every machine, Python and numpy version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Choices drawn from a stream named by its key, e.g. ``Draws("scene", seed, split, index)``.

    Everything is built on ``random.Random.random``: it is the one generator whose sequence Python promises not to
    change, while ``choice``, ``sample`` and numpy's generators may differ between versions.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key))).random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self._random()

    def choose(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely; repeat an option to make it likelier."""
        return options[int(self._random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in random order."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = int(self._random() * (last + 1))
            items[last], items[other] = items[other], items[last]
        return items
