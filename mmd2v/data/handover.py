"""How a batch gets from a loader process to the training process.

torch makes a new shared file of every tensor of a batch, copies into it, and hands its descriptor over by a connection
of its own: for 64 images of 224 pixels that is a third of what their decoding costs at 160 pixels. Here the images lie
in memory that both processes have had from the start and that is used again as soon as nothing refers to the batch;
everything else, being small, travels as bytes in the one message there is anyway. The memory is anonymous: it counts
against no limit of /dev/shm.

Where memory cannot be shared beforehand (spawned processes) or all of it is in use, images travel torch's way.

Shapes: B images, S side of an image.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mmd2v.data.batch import Batch

_SMALL = 1 << 20  # bytes of a tensor that travels in the message
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_SPARE = 2  # slots beyond the batches made ahead: the consumer's present batch, and the one being written


class Ring:
    """Slots for the images of the batches under way, some for each worker of one iteration. For forks alone: a pickled
    one is empty, and gives no slot.
    """

    def __init__(self, workers: int, prefetch: int, images: tuple[int, int]) -> None:
        """Reserve room for batches of ``images`` = (B, S) at most; a slot takes memory when it is first written."""
        count, size = images
        self.slots, self.bytes = prefetch + _SPARE, max(1, 3 * count * size * size)
        self._memory: np.ndarray | None = np.frombuffer(
            mmap.mmap(-1, max(1, workers * self.slots * self.bytes)), np.uint8
        )
        self._taken = np.frombuffer(mmap.mmap(-1, max(1, workers * self.slots)), np.uint8)
        self.number = next(_numbers)
        _rings[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}

    def take(self, worker: int, count: int, size: int) -> torch.Tensor | None:
        """In a worker: uint8 [B, 3, S, S] with channels last, not filled; None when no slot is free or large enough."""
        if self._memory is None or not 0 < 3 * count * size * size <= self.bytes:
            return None
        first = worker * self.slots
        free = np.flatnonzero(self._taken[first : first + self.slots] == 0)
        if not len(free):
            return None
        self._taken[first + free[0]] = 1
        return self._images(first + int(free[0]), count, size)

    def slot_of(self, images: torch.Tensor) -> int | None:
        """The slot that `take` gave these images; None when they lie elsewhere."""
        if self._memory is None or not images.numel():
            return None
        offset = images.data_ptr() - self._memory.ctypes.data
        return offset // self.bytes if 0 <= offset < self._memory.nbytes else None

    def lend(self, slot: int, count: int, size: int) -> torch.Tensor:
        """In the training process: a slot's images. It is free again when no tensor, view or array refers to them."""
        return self._images(slot, count, size, self._taken)

    def _images(self, slot: int, count: int, size: int, release: np.ndarray | None = None) -> torch.Tensor:
        assert self._memory is not None
        start = slot * self.bytes
        array = self._memory[start : start + 3 * count * size * size].reshape(count, size, size, 3)
        if release is not None:
            # The tensor's memory holds this very array until the last view of it is gone.
            weakref.finalize(array, release.__setitem__, slot, 0).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)


_numbers = itertools.count()
_rings: weakref.WeakValueDictionary[int, Ring] = weakref.WeakValueDictionary()
_own: Ring | None = None  # of this worker


def start_worker(ring: Ring | None) -> None:
    """Prepare a loader process."""
    global _own
    _own = ring
    _keep_freed_memory()


def new_images(count: int, size: int) -> torch.Tensor:
    """uint8 [B, 3, S, S] with channels last, not filled; in a loader process where the training process sees it."""
    info = get_worker_info()
    images = _own.take(info.id, count, size) if _own is not None and info is not None else None
    if images is None:
        images = torch.empty((count, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
    return images


def send(batch: Batch) -> Batch | Parcel:
    """Wrap a batch in a loader process; without one it stays as it is."""
    return batch if get_worker_info() is None or _own is None else Parcel.of(batch, _own)


@dataclass(frozen=True)
class Parcel:
    """A batch on its way; its images lie in a slot, its small tensors are arrays."""

    batch: Batch
    ring: int
    slot: int | None
    """None: the images travel torch's way."""
    shape: tuple[int, int]
    """B, S."""

    @classmethod
    def of(cls, batch: Batch, ring: Ring) -> Parcel:
        """Wrap a batch."""
        slot = ring.slot_of(batch.images)
        shape = batch.images.shape[0], batch.images.shape[-1]
        if slot is not None:
            batch = replace(batch, images=torch.empty(0))
        return cls(_map_fields(batch, _as_bytes), ring.number, slot, shape)

    def open(self) -> Batch:
        """Unwrap in the training process; once only."""
        batch = _map_fields(self.batch, lambda v: v.tensor() if isinstance(v, _Bytes) else v)
        return batch if self.slot is None else replace(batch, images=_rings[self.ring].lend(self.slot, *self.shape))

    def pin_memory(self) -> Batch:
        """What torch's pinning thread calls."""
        return self.open().pin_memory()


class _Bytes(NamedTuple):
    """A small tensor on its way, of any dtype (numpy has no bfloat16)."""

    data: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.data).view(self.dtype).reshape(self.shape)


def _as_bytes(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.numel() or value.nbytes > _SMALL:
        return value
    return _Bytes(value.contiguous().view(-1).view(torch.uint8).numpy(), value.dtype, value.shape)


def _map_fields(batch: Batch, function: Any) -> Batch:
    def mapped(value: Any) -> Any:
        return {k: function(v) for k, v in value.items()} if isinstance(value, dict) else function(value)

    return replace(batch, **{f.name: mapped(getattr(batch, f.name)) for f in fields(batch)})


def _keep_freed_memory() -> None:
    """Let this process keep what it frees, up to 64 MB: decoded images come and go, and new pages cost more than they.

    Only with glibc; elsewhere nothing happens.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
