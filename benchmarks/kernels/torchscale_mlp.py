"""The MLP half of torchscale's multiway encoder layer with the weights of ours, and a layer scale after it.

Shapes: T rows, those of the first expert first; D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchscale.component.feedforward_network import FeedForwardNetwork
from torchscale.component.multiway_network import MultiwayNetwork

from mmd2v_kernels import Expert

__all__ = ["torchscale_mlp"]


class Scale(nn.Module):
    """BEiT-3 has none; ours has, so both do the same work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def torchscale_mlp(
    x_TD: torch.Tensor, experts: Sequence[Expert], rows: Sequence[tuple[int, int]]
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Return the forward pass for two experts on contiguous rows and its own parameters."""
    width, hidden = x_TD.shape[1], experts[0].fc1_weight.shape[0]
    norm = nn.LayerNorm(width, eps=experts[0].eps)
    ffn = FeedForwardNetwork(width, hidden, "gelu", 0.0, 0.0, experts[0].eps)
    parts = nn.ModuleList([MultiwayNetwork(part, dim=0) for part in (norm, ffn, Scale(width))])
    parts.to(device=x_TD.device, dtype=x_TD.dtype)
    with torch.no_grad():
        for letter, expert in zip("AB", experts, strict=True):
            own = [*getattr(parts[0], letter).parameters()]
            own += [t for name in ("fc1", "fc2") for t in getattr(getattr(parts[1], letter), name).parameters()]
            own += [getattr(parts[2], letter).weight]
            for target, source in zip(own, expert[:7], strict=True):
                target.copy_(source)
    for part in parts:
        part.split_position = rows[0][1]

    def forward() -> torch.Tensor:
        return x_TD + parts[2](parts[1](parts[0](x_TD)))

    return forward, list(parts.parameters())
