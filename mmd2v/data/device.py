"""Batches from pinned memory to the device, beside the computation."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.batch import Batch
from mmd2v.data.damage import Damage, DamagedSample, DamageKind
from mmd2v.data.device_decode import decode_on


class DeviceCopy:
    """Copies on a stream of its own: the host runs ahead of the device, so the copy overlaps with the step before.

    Images that travel encoded are decoded there too.
    """

    def __init__(self, device: torch.device, config: ImageTransformConfig) -> None:
        self.device = device
        self._interpolation = config.interpolation
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device; work enqueued from here on waits for it, the host does not.

        Raises:
            Damage: an encoded image does not decode, in a batch without weights.
        """
        if self._stream is None:
            return self._decoded(batch.to(self.device))
        with torch.cuda.stream(self._stream):
            moved = self._decoded(batch.to(self.device))
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        # Without this the allocator might hand the memory out again while the step still reads it.
        moved.record_stream(current)
        return moved

    def _decoded(self, batch: Batch) -> Batch:
        """Fill in the images that came encoded; one that does not decode gets weight 0."""
        if batch.encoded is None:
            return batch
        broken = decode_on(batch.images, batch.encoded, self._interpolation)
        damaged = [
            DamagedSample(
                DamageKind.IMAGE_UNDECODABLE, *batch.encoded.places[row], f"{batch.sample_ids[row]}: {reason}"
            )
            for row, reason in broken.items()
        ]
        if damaged and batch.weights is None:
            raise Damage(damaged[0].kind, damaged[0].message)
        if damaged:
            assert batch.weights is not None
            batch.weights[list(broken)] = 0
        return replace(batch, encoded=None, damaged=(*batch.damaged, *damaged))
