"""Logits of all pairs of rows and columns, a few rows at a time, and what the contrastive losses do with them.

A chunk is folded into log-sum-exps and turned into a gradient, each in one pass by Triton (`contrastive_triton`) or in
a few by torch. Deterministic.

Shapes: N rows, M columns, n rows of a chunk, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmd2v_kernels.dispatch import choose

__all__ = ["CHUNK", "LogitChunks", "Positives", "RunningLogSumExp", "Sigmoid", "Softmax", "check_rows"]

CHUNK = 1 << 22
"""Logits in memory at once, 16 MB in fp32; torch takes the same again for what is made of them, or twice that."""
_FEWEST_ROWS = 128  # matrix products of fewer rows are slow
_MOST_ROWS = 1 << 17  # so many programs fit into the second axis of a launch, 65,535


def check_rows(images: torch.Tensor, texts: torch.Tensor) -> None:
    """Raise ValueError where there is nothing to compare."""
    if not (len(images) and len(texts)):
        raise ValueError(f"found {len(images)} images and {len(texts)} texts, expected at least one of each")


class RunningLogSumExp(NamedTuple):
    """log Σ exp of numbers that come in parts, as the largest of them and Σ exp(number − largest)."""

    largest: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of_nothing(cls, like_NX: torch.Tensor) -> RunningLogSumExp:
        """Return [N], with the dtype and device of ``like_NX``."""
        lowest = torch.finfo(like_NX.dtype).min  # not -inf: the difference of two of them would be NaN
        return cls(like_NX.new_full((len(like_NX),), lowest), like_NX.new_zeros(len(like_NX)))

    def part(self, rows: slice) -> RunningLogSumExp:
        """Return a view of some."""
        return RunningLogSumExp(self.largest[rows], self.total[rows])

    def value(self) -> torch.Tensor:
        """Return the log-sum-exp [N]."""
        return self.largest + self.total.log()


class Softmax(NamedTuple):
    """The softmax of each row, or of each column, times the weight of that query: of Q queries, C candidates."""

    largest_Q: torch.Tensor
    factor_Q: torch.Tensor
    """Weight over Σ exp(logit − largest)."""
    offset_C: torch.Tensor | None
    """What is added to the logits of a candidate."""

    @classmethod
    def of(cls, running: RunningLogSumExp, weight_Q: torch.Tensor, offset_C: torch.Tensor | None) -> Softmax:
        """Of finished sums. exp(logit − log-sum-exp) would round a number as large as the logits."""
        return cls(running.largest, weight_Q / running.total, offset_C)


class Positives(NamedTuple):
    """Pairs whose logits count with a weight of their own: at most one in every row, or one in every column."""

    index: torch.Tensor
    """int64, the column of each row or the row of each column; outside of the logits there is none."""
    weight: torch.Tensor
    in_rows: bool

    def of(self, rows: slice) -> Positives:
        """Return those of a chunk of rows, counted from its first."""
        if self.in_rows:
            return Positives(self.index[rows], self.weight[rows], True)
        return Positives(self.index - rows.start, self.weight, False)

    def places(self, size: torch.Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (row, column, weight) of each within logits of ``size``, of weight 0 where there is none.

        Choosing those that are inside would make the host wait for the device.
        """
        last = size[1 if self.in_rows else 0] - 1
        weight = torch.where((self.index >= 0) & (self.index <= last), self.weight, 0)
        index, own = self.index.clamp(0, last), torch.arange(len(self.index), device=self.index.device)
        return (own, index, weight) if self.in_rows else (index, own, weight)


class Sigmoid(NamedTuple):
    """What a classification of each pair by itself needs: −1 is the sign of a positive pair, 1 that of a negative."""

    bias: torch.Tensor
    """One element, added to each logit."""
    positive_M: torch.Tensor
    """int64, the row of each column's positive; outside of the logits there is none."""
    weight_n: torch.Tensor | None
    weight_M: torch.Tensor | None

    def of(self, rows: slice) -> Sigmoid:
        """Return what a chunk of rows needs, counted from its first."""
        weight_n = None if self.weight_n is None else self.weight_n[rows]
        return Sigmoid(self.bias, self.positive_M - rows.start, weight_n, self.weight_M)


class LogitChunks:
    """Products scale · row · column in chunks of about ``chunk``, in memory that is used again."""

    def __init__(self, operator: str, rows: int, columns: int, like: torch.Tensor, chunk: int) -> None:
        """``operator`` is the one of `dispatch.OFFERS` that asks; ``like`` has the dtype and device of the logits."""
        self._rows, self._size = rows, min(rows, max(_FEWEST_ROWS, chunk // columns), _MOST_ROWS)
        self._by_triton = choose(operator, like.device, like.dtype, rows=rows).path == "triton"
        self._logits = like.new_empty(self._size, columns)
        self._spare = None if self._by_triton else torch.empty_like(self._logits)

    def rows(self) -> list[slice]:
        """Return the rows of each chunk."""
        return [slice(top, min(top + self._size, self._rows)) for top in range(0, self._rows, self._size)]

    def logits(self, row_nD: torch.Tensor, column_MD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return [n, M], until the next call."""
        return torch.mm(scale * row_nD, column_MD.t(), out=self._logits[: len(row_nD)])

    def fold(self, running: RunningLogSumExp, logits_nM: torch.Tensor, offset: torch.Tensor | None, dim: int) -> None:
        """Add the logits to the log-sum-exp of each row (``dim`` 1) or of each column (``dim`` 0).

        ``offset`` is what each column or row adds to its logits first, None: nothing.
        """
        if self._by_triton:
            from mmd2v_kernels import contrastive_triton

            contrastive_triton.fold(*running, logits_nM, offset, dim)
            return
        seen_nM, spare_nM = logits_nM, self._spare_of(logits_nM)
        if offset is not None:
            seen_nM = torch.add(logits_nM, offset.unsqueeze(1 - dim), out=spare_nM)
        largest = torch.maximum(running.largest, seen_nM.amax(dim))
        added = torch.sub(seen_nM, largest.unsqueeze(dim), out=spare_nM).exp_().sum(dim)
        running.total.mul_(running.largest.sub_(largest).exp_()).add_(added)
        running.largest.copy_(largest)

    def softmax_gradient_(
        self, logits_nM: torch.Tensor, of_rows: Softmax, of_columns: Softmax | None, positives: Positives | None
    ) -> torch.Tensor:
        """Make of the logits the sum of the softmaxes less the weights of the positives."""
        if self._by_triton:
            from mmd2v_kernels import contrastive_triton

            return contrastive_triton.softmax_gradient_(logits_nM, of_rows, of_columns, positives)
        own_nM = _exponentials(logits_nM, of_rows, 1, out=self._spare_of(logits_nM)).mul_(of_rows.factor_Q[:, None])
        return _gradient(own_nM, logits_nM, of_columns, positives)

    def whole_rows(
        self,
        running: RunningLogSumExp,
        logits_nM: torch.Tensor,
        weight_n: torch.Tensor,
        column_offset_M: torch.Tensor | None,
        of_columns: Softmax | None,
        positives: Positives,
    ) -> torch.Tensor:
        """Do both for rows of which nothing was folded before: return their softmaxes and all that is added."""
        self.fold(running, logits_nM, column_offset_M, dim=1)
        of_rows = Softmax.of(running, weight_n, column_offset_M)
        if self._by_triton:
            return self.softmax_gradient_(logits_nM, of_rows, of_columns, positives)
        own_nM = self._spare_of(logits_nM).mul_(of_rows.factor_Q[:, None])  # folding has left the exponentials there
        return _gradient(own_nM, logits_nM, of_columns, positives)

    def sigmoid_gradient_(
        self, logits_nM: torch.Tensor, sigmoid: Sigmoid
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make of the logits the gradient of Σ weight · softplus(sign · (logit + bias)).

        Returns that sum, its derivative by the bias, and the gradient.
        """
        if self._by_triton:
            from mmd2v_kernels import contrastive_triton

            return contrastive_triton.sigmoid_gradient_(logits_nM, sigmoid)
        row_n1 = torch.arange(len(logits_nM), device=logits_nM.device)[:, None]
        sign_nM = self._spare_of(logits_nM).fill_(1).masked_fill_(sigmoid.positive_M == row_n1, -1)
        # -log sigmoid(z) = softplus(-z); of a negative z is the logit with its sign changed.
        signed_nM = logits_nM.add_(sigmoid.bias).mul_(sign_nM)
        loss_nM = F.softplus(signed_nM)
        gradient_nM = signed_nM.sigmoid_().mul_(sign_nM)
        if sigmoid.weight_n is None or sigmoid.weight_M is None:
            return loss_nM.sum(), gradient_nM.sum(), gradient_nM
        gradient_nM.mul_(sigmoid.weight_n[:, None]).mul_(sigmoid.weight_M)
        return sigmoid.weight_n @ (loss_nM @ sigmoid.weight_M), gradient_nM.sum(), gradient_nM

    def _spare_of(self, logits_nM: torch.Tensor) -> torch.Tensor:
        return self._spare[: len(logits_nM)]


def _gradient(
    of_rows_nM: torch.Tensor, logits_nM: torch.Tensor, of_columns: Softmax | None, positives: Positives | None
) -> torch.Tensor:
    if of_columns is not None:
        other_nM = _exponentials(logits_nM, of_columns, 0, out=logits_nM)
        of_rows_nM.addcmul_(other_nM, of_columns.factor_Q.expand_as(other_nM))
    if positives is not None:
        row, column, weight = positives.places(of_rows_nM.shape)
        of_rows_nM.index_put_((row, column), -weight, accumulate=True)
    return of_rows_nM


def _exponentials(logits_nM: torch.Tensor, softmax: Softmax, dim: int, out: torch.Tensor) -> torch.Tensor:
    if softmax.offset_C is not None:
        logits_nM = torch.add(logits_nM, softmax.offset_C.unsqueeze(1 - dim), out=out)
    return torch.sub(logits_nM, softmax.largest_Q.unsqueeze(dim), out=out).exp_()
