"""What recall a random ranking would reach: the level a measured number is read against."""

from __future__ import annotations

from collections.abc import Iterable
from math import comb


def chance_recall(candidates: int, positives: Iterable[int], k: int) -> float:
    """Return the expected R@k of a uniformly random ranking, averaged over queries.

    ``positives`` is the number of right answers of each query among ``candidates``. A query with c of them misses all
    k places with probability C(candidates − c, k) / C(candidates, k); with c = 1 the expectation is k / candidates.
    """
    k = min(k, candidates)
    counts: dict[int, int] = {}
    for count in positives:
        counts[count] = counts.get(count, 0) + 1
    total = comb(candidates, k)
    # In whole numbers to the last division, which is correctly rounded.
    hits = sum(number * (total - comb(candidates - count, k)) for count, number in counts.items())
    return hits / (total * sum(counts.values()))
