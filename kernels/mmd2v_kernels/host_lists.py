"""Short lists of host integers that a kernel reads: where tiles begin, where tensors lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch

__all__ = ["on_device"]

_SLOTS, _BYTES = 256, 4096
"""Of the pinned memory that lists are copied from. A slot is used again after all the others."""


def on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy integers (or equally long tuples of them) to the device without waiting for it.

    The same list again costs nothing. On another stream it is copied again: nothing says that the first copy is done
    there. In a CUDA graph a list must have been copied before the capture.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype)
    return _copied(tuple(values), dtype, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=1024)
def _copied(values: tuple, dtype: torch.dtype, device: torch.device, stream: int) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype)
    if host.nbytes > _BYTES:
        return host.pin_memory().to(device, non_blocking=True)
    # Pinning anew may wait for the device; so do slots only if all the others were filled since.
    return _ring(device).copy(host, device)


class _Ring:
    """Slots of pinned memory, each with the event after which it may be written again."""

    def __init__(self) -> None:
        self._memory = torch.empty(_SLOTS, _BYTES, dtype=torch.uint8).pin_memory()
        self._events: list[torch.cuda.Event | None] = [None] * _SLOTS
        self._next = 0

    def copy(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        slot, self._next = self._next, (self._next + 1) % _SLOTS
        event = self._events[slot]
        if event is None:
            event = self._events[slot] = torch.cuda.Event()
        else:
            event.synchronize()
        pinned = self._memory[slot, : host.nbytes].view(host.dtype).view(host.shape)
        pinned.copy_(host)
        copied = pinned.to(device, non_blocking=True)
        event.record()
        return copied


@cache
def _ring(device: torch.device) -> _Ring:
    return _Ring()
