"""What travels from the loader to the device.

Shapes: B images, N captions, S text tokens of all captions together, H W pixels, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from mmd2v.data.damage import DamagedSample

if TYPE_CHECKING:
    from mmd2v.data.device_decode import EncodedImages


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. Text is packed: no padding on the wire."""

    images: torch.Tensor
    """uint8 [B, 3, H, W], RGB, not normalised; [B, 3, 0, 0] where the samples have none."""
    text_ids: torch.Tensor
    """int32 [S], the ids of all captions end to end."""
    text_lengths: torch.Tensor
    """int32 [N] on the CPU (layouts are built on the host), tokens of each caption, special tokens included."""
    caption_image: torch.Tensor
    """int64 [N], row of `images` that each caption describes."""
    sample_ids: tuple[str, ...] = field(default=())
    """B stable ids; ``SET/ID`` in a mixture."""
    labels: torch.Tensor | None = None
    """float32 [B, A], when the config names a label key."""
    weights: torch.Tensor | None = None
    """float32 [B], 0 for a damaged sample, else 1; None where damage stops the run, so that all are 1."""
    damaged: tuple[DamagedSample, ...] = field(default=())
    """What was wrong with the samples of weight 0."""
    mean_over: float | None = None
    """What a mean over the samples divides by, where the micro-batches of a step have different numbers of them:
    samples of the step / (ranks × accumulation). The mean of all micro-batches' losses is then the mean over the step's
    samples. None: all have the same number, B."""
    encoded: EncodedImages | None = None
    """Images whose rows in `images` are still to be filled, where the device decodes."""
    teacher_outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """Teacher → its stored outputs [B or N, …], where they are replayed."""
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name in ``data.arrays`` → float32 [B, …], of those that an encoder sees; zeros for a damaged sample."""
    draw_seed: int | None = None
    """Seed of what is drawn and must not depend on the ranks (masks, dropped layers), the same on every rank and
    another in every step; None: torch's generator decides on masks, and no layer is dropped."""

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_count(self) -> int:
        """Number of images: B, or 0 where the samples have none."""
        return len(self) if self.images.shape[-1] else 0

    def square_images(self, size: int) -> torch.Tensor:
        """Return the images; [0, 3, size, size] where there are none, so that a model can be called all the same."""
        return self.images if self.image_count else self.images.new_zeros(0, 3, size, size)

    def pin_memory(self) -> Batch:
        """Pin every tensor, so that the copy to a CUDA device can overlap with work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """Copy to ``device``; ``text_lengths`` stays on the host."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, text_lengths=self.text_lengths)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that ``stream`` uses this batch's memory."""

        def record(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cuda:
                tensor.record_stream(stream)
            return tensor

        self._map(record)

    @property
    def caption_weights(self) -> torch.Tensor | None:
        """float32 [N], the weight of each caption's image."""
        return None if self.weights is None else self.weights[self.caption_image]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def mapped(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return function(value)
            return {k: function(v) for k, v in value.items()} if isinstance(value, dict) else value

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})
