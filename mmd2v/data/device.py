"""Batches from pinned memory to the device, beside the computation."""

from __future__ import annotations

import torch

from mmd2v.data.batch import Batch


class DeviceCopy:
    """Copies on a stream of its own: the host runs ahead of the device, so the copy overlaps with the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device; work enqueued from here on waits for it, the host does not."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        # Without this the allocator might hand the memory out again while the step still reads it.
        moved.record_stream(current)
        return moved
