"""Which layers a step of training skips (LayerDrop, Fan et al. 2019; stochastic depth of whole layers).

The draw is a function of the step alone: the same on every rank, so that all of them call the same modules in the same
order (ZeRO-3 gathers weights as they are called), in every micro-batch, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

_STREAM = 0x6C61796572  # "layer": masks are drawn from the same seed


def dropped_layers(
    seed: int | None, probabilities: Sequence[float], needed: Iterable[Sequence[int]] = ()
) -> frozenset[int]:
    """Return the indices of the layers that a step skips; none without a seed, see `Batch.draw_seed`.

    ``probabilities`` are those of every layer. Of each set of layers in ``needed`` (ascending) at least the last one
    stays.
    """
    if seed is None or not any(probabilities):
        return frozenset()
    bits = np.random.SeedSequence([seed, _STREAM]).generate_state(len(probabilities), np.uint64)
    drawn = (bits >> np.uint64(11)) * 2.0**-53  # [0, 1)
    dropped = {i for i, probability in enumerate(probabilities) if drawn[i] < probability}
    return frozenset(dropped - {own[-1] for own in needed if own and dropped.issuperset(own)})
