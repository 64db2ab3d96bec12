"""Seeds that are functions of a place in a run, so that a resumed run draws the same numbers without stored state."""

from __future__ import annotations

import numpy as np


def position_seed(seed: int, *position: int) -> int:
    """Return 63 well-mixed bits for a place in a run: a step, and a micro-step and rank within it."""
    mixed = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)
    return int(mixed[0]) >> 1
