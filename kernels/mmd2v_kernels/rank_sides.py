"""The items of one side of a retrieval, queries or bank rows, and what has been counted against the best positives.

Shapes: n items of this side, P positive pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Best(NamedTuple):
    """The best positive of each item."""

    score: torch.Tensor
    """float64 [n], exact; +inf for an item without."""
    index: torch.Tensor
    """int64 [n], index on the other side; the largest of its type for an item without."""


@dataclass
class Side:
    """The items of one side, each with its best positive, and what has been counted against them so far."""

    threshold: torch.Tensor
    """float64 [n], exact score of the best positive; +inf without one, so that nothing counts."""
    best: torch.Tensor
    """int64 [n], index of the best positive on the other side."""
    counts: torch.Tensor
    """int64 [3, n], see `RankCounts`."""

    @classmethod
    def of_best(cls, items_P: torch.Tensor, others_P: torch.Tensor, score_P: torch.Tensor, n: int) -> Side:
        """Find the best of each item's positives: highest score, then lowest index."""
        threshold = torch.full((n,), -torch.inf, dtype=torch.float64, device=score_P.device)
        threshold.scatter_reduce_(0, items_P, score_P, "amax")
        is_best = score_P == threshold[items_P]
        best = torch.full((n,), torch.iinfo(torch.int64).max, device=score_P.device)
        best.scatter_reduce_(0, items_P[is_best], others_P[is_best], "amin")
        threshold[threshold == -torch.inf] = torch.inf
        return cls(threshold, best, torch.zeros(3, n, dtype=torch.int64, device=score_P.device))

    @classmethod
    def both(
        cls, pairs_2P: torch.Tensor, score_P: torch.Tensor, rows: int, columns: int, row_best: Best | None
    ) -> tuple[Side, Side]:
        """Return the sides of rows and columns; ``row_best`` replaces what the pairs here say of the rows."""
        row, column = (
            cls.of_best(pairs_2P[0], pairs_2P[1], score_P, rows),
            cls.of_best(pairs_2P[1], pairs_2P[0], score_P, columns),
        )
        if row_best is not None:
            row = cls(*row_best, row.counts)
        return row, column

    def count(
        self, scores_nm: torch.Tensor, threshold: torch.Tensor, error: float, dim: int, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the scores surely above ``threshold``; return (row, column) in the block of those too close to call."""
        above = scores_nm > threshold + error
        not_below = scores_nm >= threshold - error
        number = above.sum(dim, dtype=torch.int32)
        self.counts[0, offset : offset + len(number)] += number
        if bool((not_below.sum(dim, dtype=torch.int32) == number).all()):
            empty = torch.zeros(0, dtype=torch.int64, device=scores_nm.device)
            return empty, empty
        rows, columns = (not_below ^ above).nonzero(as_tuple=True)
        return rows, columns

    def settle(self, items: torch.Tensor, others: torch.Tensor, score: torch.Tensor) -> None:
        """Count pairs that needed their exact score."""
        tied = score == self.threshold[items]
        for kind, chosen in enumerate(
            (score > self.threshold[items], tied & (others < self.best[items]), tied & (others > self.best[items]))
        ):
            self.counts[kind].index_add_(0, items[chosen], torch.ones_like(items[chosen]))
