"""The MLP half of a transformer layer, each row through the weights of its modality.

Shapes: T rows of all sequences ordered by modality, R rows that pass the experts (T unless an index leaves some out),
r of one expert, D width, F hidden width.

LayerNorm → fc1 → GELU → fc2 → dropout · layer scale · row scale → + residual (``norm="pre"``), or
fc1 → GELU → fc2 → dropout · layer scale · row scale → + residual → LayerNorm (``norm="post"``); an expert with an
inner norm applies it between GELU and fc2.
`expert_mlp` chooses how that is computed; what stands in this file is the reference.
Source: VLMo's mixture of modality experts, BEiT-3's Multiway transformer (inner norm: Magneto's sub-LN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmd2v_kernels.dispatch import choose
from mmd2v_kernels.expert_mlp_segmented import segmented_expert_mlp
from mmd2v_kernels.half_products import product_dtype

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
    index_R: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Apply ``experts[i]`` to rows ``rows[i] = (start, stop)`` of ``x_TD`` and return all rows, [T, D].

    ``rows`` are host integers that cover 0 … T in order, so no synchronisation is needed; an empty range is allowed.
    ``row_scale_T`` multiplies the branch (0 drops it: stochastic depth, which `leave_out` makes cheaper); ``dropout``
    is the probability on the branch's output. ``with_branch`` returns the rows and fc2's output [T, D] (before dropout,
    scales and residual), which data2vec calls the layer result.

    ``index_R`` (int64 [R], no row twice) lets the rows of an expert lie anywhere: ``rows`` are then ranges of it and
    cover 0 … R, and a row of ``x_TD`` that is not in it has no branch (`route` and `leave_out` make one). The branch
    that ``with_branch`` returns is 0 there. With ``norm="post"`` every row must be in it.

    Under autocast the products are of its dtype, the sums around them of that of ``x_TD`` and the weights. Which path
    runs: `mmd2v_kernels.dispatch`. Raises ValueError when the ranges do not cover the rows or ``norm`` is neither pre
    nor post.
    """
    if norm not in ("pre", "post"):
        raise ValueError(f"norm: found '{norm}', expected 'pre' or 'post'")
    _check_rows(x_TD.shape[0] if index_R is None else index_R.shape[0], experts, rows)
    if norm == "post" and index_R is not None and len(index_R) != len(x_TD):
        raise ValueError(f"index_R: found {len(index_R)} of {len(x_TD)} rows, expected all: norm 'post' changes each")
    how = {"norm": norm, "row_scale_T": row_scale_T, "dropout": dropout}
    # A compiler fuses the formula itself, and an exported graph should hold nothing else.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        out_TD, branch_RD = _reference(x_TD, experts, rows, **how, index_R=index_R)
        return (out_TD, _everywhere(branch_RD, index_R, len(x_TD))) if with_branch else out_TD
    products = product_dtype(x_TD)
    obstacle = _obstacle(x_TD, experts, row_scale_T, products)
    obstacles = {} if obstacle is None else {"segmented": obstacle, "triton": obstacle}
    no_kernel = _no_kernel(experts, norm, dropout, with_branch)
    if no_kernel is not None:
        obstacles.setdefault("triton", no_kernel)
    path = choose("expert_mlp", x_TD.device, products, rows=len(x_TD), obstacles=obstacles).path
    if path == "reference":
        out_TD, branch_RD = _reference(x_TD, experts, rows, **how, index_R=index_R)
    else:
        with torch.autocast(x_TD.device.type, enabled=False):
            if path == "triton":
                from mmd2v_kernels.expert_mlp_triton import triton_expert_mlp

                return triton_expert_mlp(
                    x_TD, experts, rows, row_scale_T=row_scale_T, index_R=index_R, products=products
                )
            out_TD, branch_RD = segmented_expert_mlp(
                x_TD, experts, rows, **how, index_R=index_R, with_branch=with_branch, stored=products
            )
    return (out_TD, _everywhere(branch_RD, index_R, len(x_TD))) if with_branch else out_TD


def _obstacle(
    x_TD: torch.Tensor, experts: Sequence[Expert], row_scale_T: torch.Tensor | None, products: torch.dtype
) -> str | None:
    """Say why only the reference can do this call; None: others can."""
    dtypes = {t.dtype for expert in experts for t in expert if isinstance(t, torch.Tensor)}
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16, torch.float16}:
        return "the weights are of several dtypes"
    if x_TD.dtype not in dtypes and products == x_TD.dtype:
        return "rows and weights are of different dtypes"
    if row_scale_T is not None and row_scale_T.requires_grad:
        return "the row scale needs a gradient"
    if len({tuple(t is None for t in expert) for expert in experts}) != 1:
        return "some experts have layer scale or inner norm, others not"
    return None


def _no_kernel(experts: Sequence[Expert], norm: str, dropout: float, with_branch: bool) -> str | None:
    """Say why the Triton kernels cannot do this call; None: they can."""
    if norm != "pre":
        return "the kernels have the norm before"
    if dropout:
        return "the kernels have no dropout"
    if with_branch:
        return "the kernels do not return the branch"
    if experts[0].inner_norm_weight is not None:
        return "the kernels have no inner norm"
    if len({expert.eps for expert in experts}) != 1:
        return "the kernels have one epsilon"
    return None


def _everywhere(branch_RD: torch.Tensor, index_R: torch.Tensor | None, total: int) -> torch.Tensor:
    if index_R is None:
        return branch_RD
    return branch_RD.new_zeros(total, branch_RD.shape[1]).index_copy(0, index_R, branch_RD)


def _reference(
    x_TD: torch.Tensor,
    experts: Sequence[Expert],
    rows: Sequence[tuple[int, int]],
    *,
    norm: str,
    row_scale_T: torch.Tensor | None,
    dropout: float,
    index_R: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [T, D] and fc2's output [R, D], in the order of the index."""
    x_RD, row_scale_R = x_TD, row_scale_T
    if index_R is not None:
        x_RD, row_scale_R = x_TD[index_R], None if row_scale_T is None else row_scale_T[index_R]
    sizes = [stop - start for start, stop in rows]
    # One split instead of a slice each: the gradient of a slice fills a whole tensor with zeros.
    x_parts = x_RD.split(sizes) if len(sizes) > 1 else [x_RD]
    scale_parts = [None] * len(sizes) if row_scale_R is None else row_scale_R.split(sizes)
    parts = [
        _one_expert(x_rD, expert, norm, scale_r, dropout)
        for x_rD, expert, scale_r in zip(x_parts, experts, scale_parts, strict=True)
    ]
    out_RD, branch_RD = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in zip(*parts, strict=True))
    if index_R is not None:
        return x_TD.to(out_RD.dtype).index_copy(0, index_R, out_RD), branch_RD
    return out_RD, branch_RD


def _one_expert(
    x_rD: torch.Tensor, expert: Expert, norm: str, row_scale_r: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = (x_rD.shape[1],)
    inner_rD = F.layer_norm(x_rD, width, expert.norm_weight, expert.norm_bias, expert.eps) if norm == "pre" else x_rD
    hidden_rF = F.gelu(F.linear(inner_rD, expert.fc1_weight, expert.fc1_bias))
    if expert.inner_norm_weight is not None:
        hidden_rF = F.layer_norm(
            hidden_rF, hidden_rF.shape[1:], expert.inner_norm_weight, expert.inner_norm_bias, expert.eps
        )
    result_rD = F.linear(hidden_rF, expert.fc2_weight) + expert.fc2_bias
    branch_rD = F.dropout(result_rD, dropout) if dropout else result_rD
    if expert.layer_scale is not None:
        branch_rD = branch_rD * expert.layer_scale
    if row_scale_r is not None:
        branch_rD = branch_rD * row_scale_r[:, None]
    x_rD = x_rD + branch_rD
    if norm == "post":
        x_rD = F.layer_norm(x_rD, width, expert.norm_weight, expert.norm_bias, expert.eps)
    return x_rD, result_rD


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
