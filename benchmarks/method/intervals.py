"""Means and differences of a few seeds with their 95 % intervals, and the sampling interval of a test set.

Student's t over the seeds says how far another set of seeds might land on the *same* test set; the binomial interval
says how far another test set of the same size might. Neither contains the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
_NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
_SLICES = 2000  # of Simpson's rule; even


class Estimate(NamedTuple):
    """A mean and half the width of its interval; None where a single value allows none."""

    mean: float
    half_width: float | None


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of ``values`` with Student's t interval of it."""
    if not values:
        raise ValueError("values: expected at least one, found none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, student_t(len(values) - 1) * math.sqrt(variance / len(values)))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Return the mean of ``values − baseline`` over the seeds both have, with its interval; None without common ones.

    What a seed does to both rows alike (order of data, initialisation) cancels.
    """
    common = sorted(values.keys() & baseline.keys())
    return mean_interval([values[seed] - baseline[seed] for seed in common]) if common else None


def binomial_half_width(fraction: float, count: int) -> float:
    """Return half the width of Wilson's 95 % interval of a ``fraction`` of ``count`` independent queries."""
    z = _NORMAL
    return z / (1 + z * z / count) * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))


def student_t(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution."""
    if degrees < 1:
        raise ValueError(f"degrees: expected at least 1, found {degrees}")
    low, high = 0.0, 13.0  # the largest quantile, of one degree, is 12.71
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| < t): with T = √degrees · tan(angle), an integral of cos^(degrees − 1)."""
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)) / 2
    end = math.atan(t / math.sqrt(degrees))
    step = end / _SLICES
    weights = (1 if i in (0, _SLICES) else 4 if i % 2 else 2 for i in range(_SLICES + 1))
    total = math.fsum(weight * math.cos(i * step) ** (degrees - 1) for i, weight in enumerate(weights))
    return total * step / 3 / whole
