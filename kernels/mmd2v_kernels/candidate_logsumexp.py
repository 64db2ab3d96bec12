"""Log-sum-exp of each query's products with many candidates: the denominator of a contrastive loss with a bank.

The products of all queries with all candidates are never there at once. As in attention, of which this is the
normaliser, the forward pass goes over blocks of candidates; it sums the gradient on the way, so that the candidates
may be replaced before the backward pass.

Shapes: Q queries, K candidates, k candidates of a block, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["candidate_logsumexp"]

_OUT_OF_SIGHT = -1e9  # of a candidate that does not count: exp is exactly 0, and no difference of two is NaN
_BLOCK = 8192


def candidate_logsumexp(
    query_QC: torch.Tensor,
    candidate_KC: torch.Tensor,
    counts_K: torch.Tensor,
    query_owner_Q: torch.Tensor,
    candidate_owner_K: torch.Tensor,
    block: int = _BLOCK,
) -> torch.Tensor:
    """Return [Q], log Σ exp(query · candidate) over the candidates that count and have another owner than the query.

    ``query_QC`` are scaled by the inverse temperature already; the gradient is with respect to them alone.
    ``candidate_KC`` may be of half precision: products are computed in fp32, or fp64 where the queries are.
    ``counts_K`` is bool, the owners int64. A query without any candidate has about -1e9: nothing, as soon as it is
    added to another sum.
    """
    with torch.autocast(query_QC.device.type, enabled=False):  # which would round products to bf16
        return _CandidateLogSumExp.apply(
            query_QC.to(torch.promote_types(query_QC.dtype, torch.float32)),
            candidate_KC,
            counts_K,
            query_owner_Q,
            candidate_owner_K,
            block,
        )


class _CandidateLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QC: torch.Tensor,
        candidate_KC: torch.Tensor,
        counts_K: torch.Tensor,
        query_owner_Q: torch.Tensor,
        candidate_owner_K: torch.Tensor,
        block: int,
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total_Q = query_QC.new_full((len(query_QC),), _OUT_OF_SIGHT)
        mean_QC = torch.zeros_like(query_QC) if needs_gradient else query_QC  # of the candidates, by their softmax
        parts = (tensor.split(block) for tensor in (candidate_KC, counts_K, candidate_owner_K))
        for candidate_kC, counts_k, owner_k in zip(*parts, strict=True):
            candidate_kC = candidate_kC.to(query_QC.dtype)
            hidden_Qk = (query_owner_Q[:, None] == owner_k) | ~counts_k
            logits_Qk = (query_QC @ candidate_kC.T).masked_fill_(hidden_Qk, _OUT_OF_SIGHT)
            before_Q = total_Q
            total_Q = torch.logaddexp(before_Q, logits_Qk.logsumexp(dim=1))
            if needs_gradient:
                mean_QC.mul_((before_Q - total_Q).exp()[:, None])
                mean_QC.addmm_(logits_Qk.sub_(total_Q[:, None]).exp_(), candidate_kC)
        if needs_gradient:
            ctx.save_for_backward(mean_QC)
        return total_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_Q,), (mean_QC,) = gradients, ctx.saved_tensors
        return gradient_Q[:, None] * mean_QC, None, None, None, None, None
