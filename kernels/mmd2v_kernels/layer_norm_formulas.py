"""LayerNorm of the rows that a Triton kernel holds, and its gradient, in fp32.

Shapes: n rows of a program, D width, held as BLOCK columns of which those ``inside`` count.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["centre_rows", "rows_gradient"]


@triton.jit
def centre_rows(x, inside, width, eps):
    """Return the rows less their mean, [n, BLOCK], 0 outside; their mean and 1 / standard deviation, [n]."""
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    return centred, mean, rstd


@triton.jit
def rows_gradient(dnormed, normed, rstd, width):
    """Return the gradient of the rows, [n, BLOCK].

    ``dnormed`` is the gradient of what was multiplied with the weight, ``rstd`` is [n, 1].
    """
    mean_d = tl.sum(dnormed, axis=1) / width
    mean_dn = tl.sum(dnormed * normed, axis=1) / width
    return (dnormed - mean_d[:, None] - normed * mean_dn[:, None]) * rstd
