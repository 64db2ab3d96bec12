"""Random numbers as pure functions of what they are for: no state to save, the same on every machine.

Only the raw words of the Philox counter generator are used: numpy may change how its distributions and permutations
consume them, but not the words themselves.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_MASK = (1 << 64) - 1


def name_hash(*names: str) -> int:
    """64-bit number of some strings, different for ``("a", "b")`` and ``("ab",)``."""
    digest = blake2b(digest_size=8)
    for name in names:
        data = name.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def words(count: int, *, seed: int, purpose: int, a: int = 0, b: int = 0) -> np.ndarray:
    """uint64 [count] of random bits, determined by the seed, a `name_hash` of the purpose, and two numbers."""
    key = np.array([seed & _MASK, purpose], np.uint64)
    # The generator counts up in the lowest word of its counter; the other words name the stream.
    counter = np.array([0, 0, a & _MASK, b & _MASK], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniforms(count: int, *, seed: int, purpose: int, a: int = 0, b: int = 0) -> np.ndarray:
    """float64 [count], uniform in [0, 1)."""
    return (words(count, seed=seed, purpose=purpose, a=a, b=b) >> np.uint64(11)) * 2.0**-53


def permutation(count: int, *, seed: int, purpose: int, a: int = 0, b: int = 0) -> np.ndarray:
    """int64 [count], the numbers 0 … count - 1 in random order."""
    return np.argsort(words(count, seed=seed, purpose=purpose, a=a, b=b), kind="stable")
