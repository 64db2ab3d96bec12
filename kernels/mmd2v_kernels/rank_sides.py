"""The items of one side of a retrieval, queries or bank rows, and what has been counted against the best positives.

Shapes: n items of this side, P positive pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
