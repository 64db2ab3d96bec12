"""Buffers that a forward pass changes, such as the running statistics of batch norms, kept equal over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from mmd2v.distributed.collectives import world_size


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replace every floating-point buffer by its mean over ranks, on every rank; the identity with one rank.

    Each rank's batch norms follow the statistics of that rank's images. Without this an evaluation spread over ranks
    measures a mixture of models, and a checkpoint holds rank 0's. Every rank must call it.
    """
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    # In fp64 the mean of equal fp32 values is that value, to the last bit: constants stay what they are.
    flat = torch.cat([buffer.double().flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
