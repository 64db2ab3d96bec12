"""Collective operations over all ranks. Every one is the identity with a single rank or without a process group.

Shapes: W ranks, n rows of this rank, N rows of all ranks together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


# torch 2.14 gave the operation this name and warns at the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _AllGather(torch.autograd.Function):
    """All-gather whose backward sums over ranks the gradient each of them has for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x_nX: torch.Tensor) -> torch.Tensor:
        ctx.rows = x_nX.shape[0]
        gathered = x_nX.new_empty((world_size() * ctx.rows, *x_nX.shape[1:]))
        _all_gather(gathered, x_nX.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient_NX,) = gradients
        summed = gradient_NX.contiguous().clone()
        dist.all_reduce(summed)
        return summed.narrow(0, rank() * ctx.rows, ctx.rows)


def all_gather_with_gradient(x_nX: torch.Tensor) -> torch.Tensor:
    """Concatenate ``x_nX`` [n, …] of all ranks in rank order to [W·n, …], differentiable through every rank.

    All ranks must hold the same n, and all must take part in the backward. DeepSpeed averages parameter gradients
    over ranks; with the mean loss over all rows, the sum done here makes that average the exact global gradient.
    """
    return x_nX if world_size() == 1 else _AllGather.apply(x_nX)


def gather_variable(x_nX: torch.Tensor) -> torch.Tensor:
    """Concatenate ``x_nX`` [n, …] of all ranks in rank order to [N, …]; n may differ, and be 0. No gradient."""
    if world_size() == 1:
        return x_nX
    sizes = [torch.zeros(1, dtype=torch.int64, device=x_nX.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([x_nX.shape[0]], dtype=torch.int64, device=x_nX.device))
    counts = [int(size) for size in sizes]
    longest = max(counts)
    padded = x_nX.new_zeros((longest, *x_nX.shape[1:]))
    padded[: x_nX.shape[0]] = x_nX.detach()
    gathered = x_nX.new_empty((world_size() * longest, *x_nX.shape[1:]))
    _all_gather(gathered, padded)
    return torch.cat([gathered[i * longest : i * longest + count] for i, count in enumerate(counts)])


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return rank ``source``'s picklable ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's picklable ``value`` in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``x`` over ranks, on every rank."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
