"""Steps that no rank applies because a loss or gradient of one of them is not finite (``stability.non_finite: skip``).

The vote is the reduction of the gradients itself. A rank whose loss or a term of it is not finite makes its gradient
not a number; the sum over ranks then is none either, on all of them, and so is its norm, which DeepSpeed looks at
before it lets the optimiser step: ZeRO 1 to 3 and the 16-bit modes leave such a step out by themselves. At ZeRO-0 in
fp32 a `GradientGate` does. So nothing more is communicated, and only ZeRO-0 waits for the device once more a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmd2v.distributed.collectives import gather_objects
from mmd2v.train.stability import Fault


class GradientGate:
    """Stands before an optimiser's step, which it takes over: only finite gradients pass.

    They are those of all ranks, so every rank decides alike. Waits for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.closed = False
        """Whether the last step was left out."""
        self._optimizer, self._step = optimizer, optimizer.step
        optimizer.step = self._pass  # type: ignore[method-assign]

    def _pass(self, *arguments: Any, **options: Any) -> Any:
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else []
        self.closed = bool(norms) and not bool(torch.stack(norms).isfinite().all())
        return None if self.closed else self._step(*arguments, **options)


class LossWatch:
    """What of the present step's losses is not finite, kept on the device."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._bad: torch.Tensor | None = None

    def watch(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Note a micro-batch's terms; return the loss to go backward from, not a number if a term is not finite."""
        self._names = tuple(losses)
        bad = ~torch.stack([term.detach().float() for term in losses.values()]).isfinite()
        self._bad = bad if self._bad is None else self._bad | bad
        # A factor, which the gradient has too: 1 changes no bit of it.
        return losses["loss"] * torch.where(bad.any(), torch.nan, 1.0)

    def reset(self) -> None:
        """Begin a new step."""
        self._bad = None

    def faults(self) -> list[Fault]:
        """Return what was not finite on which rank. Waits for the device; every rank must call it."""
        own: list[str] = []
        if self._bad is not None:
            own = [name for name, bad in zip(self._names, self._bad.tolist(), strict=True) if bad]
        return [Fault(rank, tuple(terms)) for rank, terms in enumerate(gather_objects(own)) if terms]


class RunningStatistics:
    """Buffers of batch norms, which a forward pass changes, whatever becomes of its step."""

    def __init__(self, module: nn.Module) -> None:
        norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._NormBase)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept: list[torch.Tensor] = []

    def keep(self) -> None:
        """Remember them, on the device."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """Make them what they were."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
