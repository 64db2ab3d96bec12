"""The MLP half of a transformer layer, each row through the weights of its modality.

Shapes: T rows of all sequences ordered by modality, D width, F hidden width.

LayerNorm → fc1 → GELU → fc2 → dropout · layer scale · row scale → + residual (``norm="pre"``), or
fc1 → GELU → fc2 → dropout · layer scale · row scale → + residual → LayerNorm (``norm="post"``); an expert with an
inner norm applies it between GELU and fc2.
Source: VLMo's mixture of modality experts, BEiT-3's Multiway transformer (inner norm: Magneto's sub-LN).
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
    inner_norm_weight: torch.Tensor | None = None
    """[F]; None: no inner norm"""
    inner_norm_bias: torch.Tensor | None = None
    """[F]"""
    eps: float = 1e-6
    """Of its norms."""


def expert_mlp(
    x_TD: torch.Tensor,
    experts: Sequence[Expert],
    rows: Sequence[tuple[int, int]],
    *,
    norm: str,
    row_scale_T: torch.Tensor | None = None,
    dropout: float = 0.0,
    with_branch: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Apply ``experts[i]`` to rows ``rows[i] = (start, stop)`` of ``x_TD`` and return all rows, [T, D].

    ``rows`` are host integers that cover 0 … T in order, so no synchronisation is needed; an empty range is allowed.
    ``row_scale_T`` multiplies the branch (0 drops it: stochastic depth); ``dropout`` is the probability on the
    branch's output. ``with_branch`` returns the rows and fc2's output [T, D] (before dropout, scales and residual),
    which data2vec calls the layer result. Raises ValueError when the ranges do not cover the rows or ``norm`` is
    neither pre nor post.
    """
    if norm not in ("pre", "post"):
        raise ValueError(f"norm: found '{norm}', expected 'pre' or 'post'")
    _check_rows(x_TD.shape[0], experts, rows)
    sizes = [stop - start for start, stop in rows]
    # One split instead of a slice each: the gradient of a slice fills a whole tensor with zeros.
    x_parts = x_TD.split(sizes) if len(sizes) > 1 else [x_TD]
    scale_parts = [None] * len(sizes) if row_scale_T is None else row_scale_T.split(sizes)
    parts = [
        _one_expert(x_RD, expert, norm, scale_R, dropout)
        for x_RD, expert, scale_R in zip(x_parts, experts, scale_parts, strict=True)
    ]
    out_TD, branch_TD = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in zip(*parts, strict=True))
    return (out_TD, branch_TD) if with_branch else out_TD


def _one_expert(
    x_TD: torch.Tensor, expert: Expert, norm: str, row_scale_T: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = (x_TD.shape[1],)
    inner_TD = F.layer_norm(x_TD, width, expert.norm_weight, expert.norm_bias, expert.eps) if norm == "pre" else x_TD
    hidden_TF = F.gelu(F.linear(inner_TD, expert.fc1_weight, expert.fc1_bias))
    if expert.inner_norm_weight is not None:
        hidden_TF = F.layer_norm(
            hidden_TF, hidden_TF.shape[1:], expert.inner_norm_weight, expert.inner_norm_bias, expert.eps
        )
    result_TD = F.linear(hidden_TF, expert.fc2_weight) + expert.fc2_bias
    branch_TD = F.dropout(result_TD, dropout) if dropout else result_TD
    if expert.layer_scale is not None:
        branch_TD = branch_TD * expert.layer_scale
    if row_scale_T is not None:
        branch_TD = branch_TD * row_scale_T[:, None]
    x_TD = x_TD + branch_TD
    if norm == "post":
        x_TD = F.layer_norm(x_TD, width, expert.norm_weight, expert.norm_bias, expert.eps)
    return x_TD, result_TD


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
