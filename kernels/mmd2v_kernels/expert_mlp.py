"""The MLP half of a transformer layer, each row through the weights of its modality.

Shapes: T rows of all sequences ordered by modality, D width, F hidden width.

LayerNorm → fc1 → GELU → fc2 → dropout · layer scale · row scale → + residual (``norm="pre"``), or
fc1 → GELU → fc2 → dropout · layer scale · row scale → + residual → LayerNorm (``norm="post"``).
Source: VLMo's mixture of modality experts, BEiT-3's Multiway transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["Expert", "expert_mlp"]


class Expert(NamedTuple):
    """The weights of one modality's MLP and of the norm that belongs to it."""

    norm_weight: torch.Tensor
    """[D]"""
    norm_bias: torch.Tensor
    """[D]"""
    fc1_weight: torch.Tensor
    """[F, D]"""
    fc1_bias: torch.Tensor
    """[F]"""
    fc2_weight: torch.Tensor
    """[D, F]"""
    fc2_bias: torch.Tensor
    """[D]"""
    layer_scale: torch.Tensor | None = None
    """[D]; None: 1"""


def expert_mlp(
    x_TD: torch.Tensor,
    experts: Sequence[Expert],
    rows: Sequence[tuple[int, int]],
    *,
    norm: str,
    eps: float,
    row_scale_T: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Apply ``experts[i]`` to rows ``rows[i] = (start, stop)`` of ``x_TD`` and return all rows, [T, D].

    ``rows`` are host integers that cover 0 … T in order, so no synchronisation is needed; an empty range is allowed.
    ``row_scale_T`` multiplies the branch (0 drops it: stochastic depth); ``dropout`` is the probability on the
    branch's output. Raises ValueError when the ranges do not cover the rows or ``norm`` is neither pre nor post.
    """
    if norm not in ("pre", "post"):
        raise ValueError(f"norm: found '{norm}', expected 'pre' or 'post'")
    _check_rows(x_TD.shape[0], experts, rows)
    sizes = [stop - start for start, stop in rows]
    # One split instead of a slice each: the gradient of a slice fills a whole tensor with zeros.
    x_parts = x_TD.split(sizes) if len(sizes) > 1 else [x_TD]
    scale_parts = [None] * len(sizes) if row_scale_T is None else row_scale_T.split(sizes)
    parts = [
        _one_expert(x_RD, expert, norm, eps, scale_R, dropout)
        for x_RD, expert, scale_R in zip(x_parts, experts, scale_parts, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one_expert(
    x_TD: torch.Tensor, expert: Expert, norm: str, eps: float, row_scale_T: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    width = (x_TD.shape[1],)
    branch_TD = F.layer_norm(x_TD, width, expert.norm_weight, expert.norm_bias, eps) if norm == "pre" else x_TD
    branch_TD = F.linear(F.gelu(F.linear(branch_TD, expert.fc1_weight, expert.fc1_bias)), expert.fc2_weight)
    branch_TD = branch_TD + expert.fc2_bias
    if dropout:
        branch_TD = F.dropout(branch_TD, dropout)
    if expert.layer_scale is not None:
        branch_TD = branch_TD * expert.layer_scale
    if row_scale_T is not None:
        branch_TD = branch_TD * row_scale_T[:, None]
    x_TD = x_TD + branch_TD
    return F.layer_norm(x_TD, width, expert.norm_weight, expert.norm_bias, eps) if norm == "post" else x_TD


def _check_rows(total: int, experts: Sequence[Expert], rows: Sequence[tuple[int, int]]) -> None:
    if len(experts) != len(rows):
        raise ValueError(f"rows: found {len(rows)} ranges, expected one for each of {len(experts)} experts")
    position = 0
    for start, stop in rows:
        if start != position or stop < start:
            raise ValueError(f"rows: found {list(rows)}, expected consecutive ranges that cover 0 … {total}")
        position = stop
    if position != total:
        raise ValueError(f"rows: found {list(rows)}, expected consecutive ranges that cover 0 … {total}")
