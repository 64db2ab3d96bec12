"""Maps from the student's width to a teacher's."""

from __future__ import annotations

from torch import nn

from mmd2v.errors import UserError


def regression_head(kind: str, width: int, target_width: int, where: str) -> nn.Module:
    """Return the head a config calls ``none``, ``linear``, ``norm_linear`` or ``mlp``.

    Raises UserError, beginning with ``where``, for ``none`` between different widths.
    """
    if kind == "none":
        if width != target_width:
            raise UserError(
                f"{where}: found none, but the student's width {width} is not the teacher's {target_width}; expected "
                "linear, norm_linear or mlp"
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, target_width)
    if kind == "norm_linear":
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, target_width))
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, target_width))
