"""What is raised when a run has diverged, and the vote of all ranks on whether their weights are still numbers."""

from __future__ import annotations

import torch
from torch import nn

from mmd2v.distributed.collectives import gather_objects, rank
from mmd2v.errors import ReportedByMainRank, UserError

ADVICE = "try a lower optimizer.lr, a longer optimizer.warmup or optimizer.clip_norm"


class Diverged(UserError):
    """Loss, gradient or weights are no numbers, or the loss has jumped. Raised on every rank at the same step."""

    spike = False
    """Whether all are numbers still."""


class _DivergedElsewhere(Diverged, ReportedByMainRank):
    """The copy of another rank than 0, which tells it."""


def diverged(message: str, *, spike: bool = False) -> Diverged:
    """Return what this rank raises when all ranks have found the same."""
    error = Diverged(message) if rank() == 0 else _DivergedElsewhere(message)
    error.spike = spike
    return error


def check_weights(module: nn.Module, step: int) -> None:
    """Raise Diverged naming the ranks that hold parameters or buffers which are not finite; every rank must call it.

    A loss tells of the weights before its step, so the last update is seen here alone. The test is the fp32 sum of
    squares of each tensor: weights so large that it overflows are as lost as infinite ones. Under ZeRO-3 each rank
    looks at its own shards.
    """
    held = [_own_part(parameter) for parameter in module.parameters()]
    held += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    squares = [_sum_of_squares(tensor).to(held[0].device) for tensor in held]  # offloaded weights are elsewhere
    finite = not squares or bool(torch.stack(squares).isfinite().all())
    ranks = [str(i) for i, good in enumerate(gather_objects(finite)) if not good]
    if ranks:
        raise diverged(
            f"step {step}: weights became infinite or not a number on rank(s) {', '.join(ranks)}, and are not saved; "
            f"{ADVICE}"
        )


def _own_part(parameter: nn.Parameter) -> torch.Tensor:
    """Return the parameter, or this rank's shard of it without the padding, which is memory nobody has written to."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    return shard.flatten()[: max(0, parameter.ds_numel - rank() * shard.numel())]


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    flat = x.detach().float().flatten()
    return flat.dot(flat)
