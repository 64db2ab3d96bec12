"""Random numbers as pure functions of what they are for: no state to save, the same on every machine and version.

The bits come from SHAKE-128, which is a standard; numpy promises neither its distributions nor its permutations.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator

import numpy as np


def words(count: int, *key: str | int) -> np.ndarray:
    """uint64 [count] of random bits, determined by the key: purpose, seed, and whatever else it is to depend on."""
    digest = hashlib.shake_128(json.dumps(key).encode()).digest(8 * count)
    return np.frombuffer(digest, "<u8")


def uniforms(count: int, *key: str | int) -> np.ndarray:
    """float64 [count], uniform in [0, 1)."""
    return (words(count, *key) >> np.uint64(11)) * 2.0**-53


def lazy_uniforms(count: int, *key: str | int) -> Iterator[float]:
    """The numbers of `uniforms` one by one, for the few that a single sample needs: numpy costs more than they do."""
    digest = hashlib.shake_128(json.dumps(key).encode()).digest(8 * count)
    return ((word >> 11) * 2.0**-53 for word in struct.unpack(f"<{count}Q", digest))


def permutation(count: int, *key: str | int) -> np.ndarray:
    """int64 [count], the numbers 0 … count - 1 in random order."""
    return np.argsort(words(count, *key), kind="stable")
