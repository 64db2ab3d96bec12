"""From uint8 images on the device to what a model expects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return square images [B, 3, H, H] resized to ``size`` pixels, fp32 in [0, 255]; bicubic, antialiased."""
    if images.shape[-1] == size:
        return images.float()
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255)


class Normalize(nn.Module):
    """uint8 [B, 3, H, W] → (x / 255 − mean) / std, resized to ``size`` pixels when the input has another size."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int | None = None) -> None:
        super().__init__()
        # Buffers outside the state dict: they come from the config, and a checkpoint must not override it.
        self.register_buffer("offset", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("factor", 1 / (torch.tensor(std).view(1, 3, 1, 1) * 255), persistent=False)
        self.size = size

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return [B, 3, size, size] of ``dtype``, channels last in memory (convolutions are faster so)."""
        x = images.to(torch.float32, memory_format=torch.channels_last)
        if self.size is not None:
            x = resize(x, self.size)
        x = (x - self.offset.float()) * self.factor.float()
        return x.to(dtype)
