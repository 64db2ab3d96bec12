"""What travels from the loader to the device.

Shapes: B images, N captions, S text tokens of all captions together, H W pixels, A attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. Text is packed: no padding on the wire."""

    images: torch.Tensor
    """uint8 [B, 3, H, W], RGB, not normalised."""
    text_ids: torch.Tensor
    """int32 [S], the ids of all captions end to end."""
    text_lengths: torch.Tensor
    """int32 [N] on the CPU (layouts are built on the host), tokens of each caption, special tokens included."""
    caption_image: torch.Tensor
    """int64 [N], row of `images` that each caption describes."""
    sample_ids: tuple[str, ...] = field(default=())
    """B stable ids."""
    labels: torch.Tensor | None = None
    """float32 [B, A], when the config names a label key."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def pin_memory(self) -> Batch:
        """Pin every tensor, so that the copy to a CUDA device can overlap with work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """Copy to ``device``; ``text_lengths`` stays on the host."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, text_lengths=self.text_lengths)

    def _map(self, function) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})
