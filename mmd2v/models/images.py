"""From uint8 images on the device to what a model expects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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
        if self.size is not None and x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            x = x.clamp(0, 255)
        x = (x - self.offset.float()) * self.factor.float()
        return x.to(dtype)
