"""`expert_mlp` with torch's matrix products on contiguous slices, one autograd node a layer.

Every expert's rows are a view: nothing is gathered or concatenated unless the caller gives an index. Between forward
and backward only the input and the pre-activation h are kept (post-norm: the sum before the norm too); LayerNorm and
GELU are computed again. Rows go through in blocks, so that what is in between exists for one block at a time and its
memory is used again. fc2's output is not kept either: with u = the branch's gradient before the layer scale γ,
dγ_j = ⟨W2_j, (uᵀ g)_j⟩ + b2_j Σ u_j.

Half precision on a processor without instructions for it is computed in fp32 and only stored in halves
(`half_products`).

Deterministic for a given number of threads.

Shapes: T rows of ``x``, R rows that pass the experts, r of one block, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from mmd2v_kernels.half_products import FP32_ROWS, multiplies

if TYPE_CHECKING:
    from mmd2v_kernels.expert_mlp import Expert

__all__ = ["segmented_expert_mlp"]

_BLOCK = 2048
"""Rows at a time on the CPU: [2048, 3072] in fp32 is 25 MB, and the products are as fast as of all rows at once."""


class Call(NamedTuple):
    """What a call knows on the host."""

    rows: tuple[tuple[int, int], ...]
    norm: str
    dropout: float
    with_branch: bool
    stored: torch.dtype
    """Of the products' results, and of h."""
    arithmetic: torch.dtype
    """Of the products' operands."""
    block: int
    eps: tuple[float, ...]
    fields: int
    """Tensors of an expert."""


class Saved(NamedTuple):
    """What the backward pass needs beside the arguments."""

    h_RF: torch.Tensor | None
    """Before GELU."""
    y_RD: torch.Tensor | None
    """Before the norm, where it comes last."""
    kept_RD: torch.Tensor | None
    """bool: not dropped out."""
    result_RD: torch.Tensor | None
    """fc2's output; only where the caller asked for it too."""


def segmented_expert_mlp(
    x_TD: torch.Tensor,
    experts: Sequence[Expert],
    rows: Sequence[tuple[int, int]],
    *,
    norm: str,
    row_scale_T: torch.Tensor | None,
    dropout: float,
    with_branch: bool,
    index_R: torch.Tensor | None,
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what `expert_mlp` says; ``stored`` is the dtype of the products. Returns (rows [T, D], branch or None)."""
    arithmetic = stored if multiplies(x_TD.device.type, stored) else torch.float32
    tensors = [[field for field in expert if not isinstance(field, float)] for expert in experts]
    call = Call(
        rows=tuple(rows),
        norm=norm,
        dropout=dropout,
        with_branch=with_branch,
        stored=stored,
        arithmetic=arithmetic,
        block=_block(x_TD.device.type, arithmetic == stored, rows),
        eps=tuple(expert.eps for expert in experts),
        fields=len(tensors[0]),
    )
    flat = [tensor for fields in tensors for tensor in fields]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TD, *flat)):
        out = _SegmentedMLP.apply(x_TD, index_R, row_scale_T, call, *flat)
        return out if with_branch else (out, None)
    out_TD, saved = _forward(call, x_TD, index_R, row_scale_T, experts, keep=False)
    return out_TD, saved.result_RD


def _block(device: str, own_arithmetic: bool, rows: Sequence[tuple[int, int]]) -> int:
    """Return how many rows go through at a time."""
    if device != "cpu":
        return max(1, *(stop - start for start, stop in rows))
    return _BLOCK if own_arithmetic else min(_BLOCK, FP32_ROWS)


class _SegmentedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        index_R: torch.Tensor | None,
        row_scale_T: torch.Tensor | None,
        call: Call,
        *flat: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out_TD, saved = _forward(call, x_TD, index_R, row_scale_T, _experts(call, flat), keep=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        # The weights themselves, not copies in another dtype: sharded parameters are gathered into them again.
        ctx.save_for_backward(x_TD, index_R, row_scale_T, *saved, *flat)
        if call.with_branch:
            assert saved.result_RD is not None
            return out_TD, saved.result_RD
        return out_TD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the gradients is asked for, and would lack this part of it
            raise RuntimeError("expert_mlp: only its reference has second derivatives; set MMD2V_KERNELS=reference")
        x_TD, index_R, row_scale_T, *rest = ctx.saved_tensors
        saved, flat = Saved(*rest[: len(Saved._fields)]), rest[len(Saved._fields) :]
        experts = _experts(ctx.call, flat)
        wanted = [needed and t is not None for needed, t in zip(ctx.needs_input_grad[4:], flat, strict=True)]
        dx_TD, dweights = _backward(ctx.call, gradients, x_TD, index_R, row_scale_T, experts, saved, wanted)
        return dx_TD if ctx.needs_input_grad[0] else None, None, None, None, *dweights


def _experts(call: Call, flat: Sequence[torch.Tensor | None]) -> list[Expert]:
    from mmd2v_kernels.expert_mlp import Expert

    n = call.fields
    return [Expert(*flat[i * n : (i + 1) * n], eps) for i, eps in enumerate(call.eps)]


def _forward(
    call: Call,
    x_TD: torch.Tensor,
    index_R: torch.Tensor | None,
    row_scale_T: torch.Tensor | None,
    experts: Sequence[Expert],
    keep: bool,
) -> tuple[torch.Tensor, Saved]:
    total, width, hidden = call.rows[-1][1], x_TD.shape[1], experts[0].fc1_weight.shape[0]
    wide = torch.promote_types(x_TD.dtype, experts[0].fc2_bias.dtype)
    new = x_TD.new_empty
    out_TD = new(x_TD.shape, dtype=wide) if index_R is None else x_TD.to(wide, copy=True)
    h_RF = new((total, hidden), dtype=call.stored) if keep else None
    y_RD = new((total, width), dtype=wide) if keep and call.norm == "post" else None
    kept_RD = new((total, width), dtype=torch.bool).bernoulli_(1 - call.dropout) if call.dropout else None
    result_RD = new((total, width), dtype=wide) if call.with_branch else None
    scratch = _Scratch(call, x_TD, hidden)
    for expert, (start, stop) in zip(experts, call.rows, strict=True):
        if start == stop:
            continue
        w1_FD, b1_F, w2_DF = (t.to(call.arithmetic) for t in expert[2:5])
        for block in _blocks(start, stop, call.block):
            x_rD, scale_r1 = _rows(x_TD, row_scale_T, index_R, block)
            n_rD = _normed(x_rD, expert, call.arithmetic) if call.norm == "pre" else x_rD.to(call.arithmetic)
            own = h_RF is not None and h_RF.dtype == call.arithmetic
            h_rF = torch.addmm(b1_F, n_rD, w1_FD.t(), out=h_RF[block] if own else scratch.first(block))
            if h_RF is not None and not own:
                h_RF[block] = h_rF
            g_rF = _gelu(h_rF, scratch.second(block) if own else h_rF)
            if expert.inner_norm_weight is not None:
                g_rF = _inner(g_rF, expert)[0]
            # The bias apart, as in the reference: in fp32 both are then equal to the last bit.
            t_rD = torch.mm(g_rF, w2_DF.t()).to(wide).add_(expert.fc2_bias)
            if result_RD is not None:
                result_RD[block] = t_rD
            y_rD = _scaled(t_rD, expert, scale_r1, None if kept_RD is None else kept_RD[block], call.dropout).add_(x_rD)
            if y_RD is not None:
                y_RD[block] = y_rD
            if call.norm == "post":
                y_rD = _normed(y_rD, expert, wide)
            out_TD[block if index_R is None else index_R[block]] = y_rD
    return out_TD, Saved(h_RF, y_RD, kept_RD, result_RD)


def _backward(
    call: Call,
    gradients: Sequence[torch.Tensor | None],
    x_TD: torch.Tensor,
    index_R: torch.Tensor | None,
    row_scale_T: torch.Tensor | None,
    experts: Sequence[Expert],
    saved: Saved,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the gradients of ``x`` and of the tensors of all experts, None where ``wanted`` is False."""
    dout_TD = torch.zeros_like(x_TD) if gradients[0] is None else gradients[0]
    dresult_RD = gradients[1] if call.with_branch else None
    # Rows that no expert sees pass their gradient on.
    dx_TD = torch.empty_like(x_TD) if index_R is None else dout_TD.to(x_TD.dtype, copy=True)
    scratch = _Scratch(call, x_TD, experts[0].fc1_weight.shape[0])
    assert saved.h_RF is not None
    dweights: list[torch.Tensor | None] = []
    for i, (expert, (start, stop)) in enumerate(zip(experts, call.rows, strict=True)):
        wants = wanted[i * call.fields : (i + 1) * call.fields]
        sums = _Sums(expert, wants, call.arithmetic)
        w1_FD, w2_DF = (t.to(call.arithmetic) for t in (expert.fc1_weight, expert.fc2_weight))
        for block in _blocks(start, stop, call.block):
            where = block if index_R is None else index_R[block]
            x_rD, scale_r1 = _rows(x_TD, row_scale_T, index_R, block)
            dy_rD = dout_TD[where]
            if call.norm == "post":
                assert saved.y_RD is not None
                dy_rD = sums.norm(dy_rD, saved.y_RD[block])
            u_rD = dy_rD  # the gradient of the branch before the layer scale
            if scale_r1 is not None:
                u_rD = u_rD * scale_r1
            if saved.kept_RD is not None:
                u_rD = u_rD * saved.kept_RD[block] / (1 - call.dropout)
            h_rF = saved.h_RF[block].to(call.arithmetic)
            g_rF = _gelu(h_rF, scratch.first(block))
            m_rF, *statistics = (g_rF,) if expert.inner_norm_weight is None else _inner(g_rF, expert)
            dt_rD = sums.fc2(u_rD, m_rF, saved, dresult_RD, block)
            dh_rF = torch.mm(dt_rD, w2_DF, out=scratch.second(block))
            if statistics:
                dh_rF = sums.inner(dh_rF, g_rF, statistics)
            dh_rF = torch.ops.aten.gelu_backward.grad_input(dh_rF, h_rF, grad_input=dh_rF)
            n_rD = _normed(x_rD, expert, call.arithmetic) if call.norm == "pre" else x_rD.to(call.arithmetic)
            sums.fc1(dh_rF, n_rD)
            dn_rD = torch.mm(dh_rF, w1_FD)
            if call.norm == "pre":
                dn_rD = sums.norm(dn_rD, x_rD)
            dx_TD[where] = dn_rD.to(dy_rD.dtype).add_(dy_rD).to(dx_TD.dtype)
        dweights += sums.finish()
    return dx_TD, dweights


class _Sums:
    """The gradients of one expert's tensors, summed over its blocks."""

    def __init__(self, expert: Expert, wants: Sequence[bool], arithmetic: torch.dtype) -> None:
        self.expert = expert
        self.wants = wants
        sums = torch.promote_types(arithmetic, torch.float32)
        self.arithmetic = arithmetic
        self.branch_counts = False
        """Something was computed from fc2's output itself: the layer scale cannot be read off fc2's gradients."""
        tensors = expert[: len(wants)]
        if wants[6]:  # the layer scale's gradient is read off those of fc2
            wants = [*wants[:4], True, True, *wants[6:]]
        self.of = [
            torch.zeros_like(t, dtype=sums) if want and t is not None else None
            for want, t in zip(wants, tensors, strict=True)
        ]

    def norm(self, dn_rD: torch.Tensor, x_rD: torch.Tensor) -> torch.Tensor:
        """Go back through the norm of the rows ``x_rD``."""
        e = self.expert
        return self._norm(dn_rD, x_rD, e.norm_weight, e.norm_bias, 0, None)

    def inner(self, dm_rF: torch.Tensor, g_rF: torch.Tensor, statistics: Sequence[torch.Tensor]) -> torch.Tensor:
        """Go back through the norm between GELU and fc2."""
        e = self.expert
        return self._norm(dm_rF, g_rF, e.inner_norm_weight, e.inner_norm_bias, 7, statistics)

    def fc2(
        self,
        u_rD: torch.Tensor,
        m_rF: torch.Tensor,
        saved: Saved,
        dresult_RD: torch.Tensor | None,
        block: slice,
    ) -> torch.Tensor:
        """Add up what belongs to fc2 and the layer scale; return the gradient of fc2's output [r, D]."""
        scale_D = self.expert.layer_scale
        dt_rD = u_rD if scale_D is None else u_rD * scale_D
        if dresult_RD is None:
            # Without the layer scale, which `finish` multiplies in.
            self._product(4, u_rD.to(self.arithmetic), m_rF)
            self._column_sum(5, u_rD)
            return dt_rD.to(self.arithmetic)
        dt_rD = dt_rD + dresult_RD[block]
        if scale_D is not None and self.wants[6]:
            assert saved.result_RD is not None
            self._column_sum(6, u_rD * saved.result_RD[block])
        if self.wants[5]:
            self._column_sum(5, dt_rD)
        dt_rD = dt_rD.to(self.arithmetic)
        if self.wants[4]:
            self._product(4, dt_rD, m_rF)
        self.branch_counts = True
        return dt_rD

    def fc1(self, dh_rF: torch.Tensor, n_rD: torch.Tensor) -> None:
        """Add up what belongs to fc1."""
        self._product(2, dh_rF, n_rD)
        self._column_sum(3, dh_rF)

    def finish(self) -> list[torch.Tensor | None]:
        """Return the gradients in the dtypes of the tensors."""
        e, (dw2_DF, db2_D, dscale_D) = self.expert, self.of[4:7]
        if e.layer_scale is not None and not self.branch_counts:
            scale_D = e.layer_scale.to(torch.promote_types(self.arithmetic, torch.float32))
            if dscale_D is not None:
                assert dw2_DF is not None and db2_D is not None
                dscale_D.copy_(torch.linalg.vecdot(dw2_DF, e.fc2_weight.to(dw2_DF.dtype)))
                dscale_D.addcmul_(db2_D, e.fc2_bias.to(db2_D.dtype))
            if dw2_DF is not None:
                dw2_DF *= scale_D[:, None]
            if db2_D is not None:
                db2_D *= scale_D
        return [
            None if not want or total is None else total.to(t.dtype)
            for want, total, t in zip(self.wants, self.of, e[: len(self.wants)], strict=True)
        ]

    def _product(self, place: int, left_rX: torch.Tensor, right_rY: torch.Tensor) -> None:
        total_XY = self.of[place]
        if total_XY is None:
            return
        if total_XY.dtype == left_rX.dtype:
            total_XY.addmm_(left_rX.t(), right_rY)
        else:
            total_XY.add_(torch.mm(left_rX.t(), right_rY))

    def _column_sum(self, place: int, rows_rX: torch.Tensor) -> None:
        total_X = self.of[place]
        if total_X is not None:
            total_X.add_(rows_rX.sum(dim=0, dtype=total_X.dtype))

    def _norm(
        self,
        dn_rX: torch.Tensor,
        x_rX: torch.Tensor,
        weight_X: torch.Tensor,
        bias_X: torch.Tensor,
        place: int,
        statistics: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        weight_X, bias_X = _affine(x_rX, weight_X, bias_X)
        if statistics is None:
            statistics = torch.native_layer_norm(x_rX, x_rX.shape[1:], weight_X, bias_X, self.expert.eps)[1:]
        mask = [True, self.of[place] is not None, self.of[place + 1] is not None]
        dx_rX, *dweights = torch.ops.aten.native_layer_norm_backward(
            dn_rX.to(x_rX.dtype), x_rX, x_rX.shape[1:], *statistics, weight_X, bias_X, mask
        )
        for total, part in zip(self.of[place : place + 2], dweights, strict=True):
            if total is not None:
                total.add_(part)
        return dx_rX


class _Scratch:
    """Two buffers of [block, F] that all blocks use."""

    def __init__(self, call: Call, x_TD: torch.Tensor, hidden: int) -> None:
        longest = max(stop - start for start, stop in call.rows)
        self._shape = (min(call.block, longest), hidden)
        self._like = {"dtype": call.arithmetic, "device": x_TD.device}
        self._buffers: list[torch.Tensor | None] = [None, None]

    def first(self, block: slice) -> torch.Tensor:
        return self._get(0, block)

    def second(self, block: slice) -> torch.Tensor:
        return self._get(1, block)

    def _get(self, which: int, block: slice) -> torch.Tensor:
        buffer = self._buffers[which]
        if buffer is None:
            buffer = self._buffers[which] = torch.empty(self._shape, **self._like)
        return buffer[: block.stop - block.start]


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(low, min(low + size, stop)) for low in range(start, stop, size)]


def _rows(
    x_TD: torch.Tensor, row_scale_T: torch.Tensor | None, index_R: torch.Tensor | None, block: slice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    where = block if index_R is None else index_R[block]
    return x_TD[where], None if row_scale_T is None else row_scale_T[where][:, None]


def _affine(x_rX: torch.Tensor, weight_X: torch.Tensor, bias_X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias in the dtype with which a norm of these rows keeps its statistics in fp32."""
    half = x_rX.dtype in (torch.bfloat16, torch.float16)
    # On the CPU the statistics have the dtype of the weights, on CUDA weights must have the dtype of the rows.
    dtype = torch.float32 if half and x_rX.device.type == "cpu" else x_rX.dtype
    return weight_X.to(dtype), bias_X.to(dtype)


def _normed(x_rD: torch.Tensor, expert: Expert, dtype: torch.dtype) -> torch.Tensor:
    weight_D, bias_D = _affine(x_rD, expert.norm_weight, expert.norm_bias)
    return F.layer_norm(x_rD, x_rD.shape[1:], weight_D, bias_D, expert.eps).to(dtype)


def _inner(g_rF: torch.Tensor, expert: Expert) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert expert.inner_norm_weight is not None and expert.inner_norm_bias is not None
    affine = _affine(g_rF, expert.inner_norm_weight, expert.inner_norm_bias)
    return torch.native_layer_norm(g_rF, g_rF.shape[1:], *affine, expert.eps)


def _gelu(h_rF: torch.Tensor, out_rF: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu.out(h_rF, out=out_rF)


def _scaled(
    t_rD: torch.Tensor, expert: Expert, scale_r1: torch.Tensor | None, kept_rD: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Multiply the branch, in place, by everything that scales it."""
    if kept_rD is not None:
        t_rD.mul_(kept_rD).div_(1 - dropout)
    if expert.layer_scale is not None:
        t_rD.mul_(expert.layer_scale)
    if scale_r1 is not None:
        t_rD.mul_(scale_r1)
    return t_rD
