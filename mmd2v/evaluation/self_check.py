"""Does the evaluation itself give chance when captions are dealt to the wrong images?

Recall above chance on pairs that are shuffled would mean that ids leak into the ranking (an order that follows the
file, say), and that the number on the real pairs cannot be trusted either.
"""

from __future__ import annotations

import math

import torch

from mmd2v.errors import UserError

_DEVIATIONS = 6.0


def shuffled_items(caption_item_N: torch.Tensor, items: int, seed: int) -> torch.Tensor:
    """Return ``caption_item_N`` with the items renamed at random: captions of one image stay together."""
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    return order.to(caption_item_N.device)[caption_item_N]


def check_chance(name: str, found: float, chance: float, queries: int, together: int) -> None:
    """Raise UserError when the recall of shuffled pairs is further from chance than chance itself can explain.

    ``together`` is the largest number of captions of an image: as many queries may hit or miss as one.
    """
    spread = math.sqrt(chance * (1 - chance) * together / queries)
    allowed = _DEVIATIONS * spread + together / queries
    if abs(found - chance) > allowed:
        raise UserError(
            f"evaluation: shuffled pairs give {name} {100 * found:.3f} %, expected chance, {100 * chance:.3f} % ± "
            f"{100 * allowed:.3f}: this evaluation cannot be trusted"
        )
