"""Copies of an engine's state on the host, which training cannot reach any more while they are written to files."""

from __future__ import annotations

import copy
from typing import Any

import torch


class HostBuffers:
    """Host memory for the copies of one checkpoint, used again for the next: page-locked where the state is on CUDA.

    It stays as large as the last checkpoint of this rank. Memory that is new costs the host as much time as the copy.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._used: list[tuple[tuple[int, bool], torch.Tensor]] = []
        self._devices: set[torch.device] = set()

    def begin(self) -> None:
        """Start the copies of a checkpoint; those of the one before are no longer needed."""
        self._free, self._devices = {}, set()
        for key, buffer in self._used:
            self._free.setdefault(key, []).append(buffer)
        self._used = []

    def copy(self, value: Any) -> Any:
        """Return a deep copy of ``value`` with its tensors on the host.

        Tensors that share a storage share the copy. Copies from CUDA are complete only after `complete`. Raises
        RuntimeError or MemoryError without memory.
        """
        return _Copy(self).of(value)

    def complete(self) -> None:
        """Wait once for all copies that are under way, and let go of memory that this checkpoint did not need."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._free = {}

    def bytes_of(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return a storage on the host with the content of ``storage``."""
        size, cuda = storage.nbytes(), storage.device.type == "cuda"
        if size == 0:
            return torch.UntypedStorage(0)
        key = (size, cuda)
        buffer = self._free[key].pop() if self._free.get(key) else _memory(size, page_locked=cuda)
        self._used.append((key, buffer))
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))
        buffer.copy_(source, non_blocking=cuda)
        if cuda:
            self._devices.add(storage.device)
        return buffer.untyped_storage()


def _memory(size: int, *, page_locked: bool) -> torch.Tensor:
    if page_locked:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the system allows no more of it; the copy is slower then
            pass
    return torch.empty(size, dtype=torch.uint8)


class _Copy:
    """One deep copy: remembers what it has met, so that what is shared stays shared."""

    def __init__(self, buffers: HostBuffers) -> None:
        self._buffers = buffers
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._seen: dict[int, Any] = {}
        self._plain: dict[int, Any] = {}  # deepcopy's own memory

    def of(self, value: Any) -> Any:
        if id(value) not in self._seen:
            self._seen[id(value)] = self._new(value)
        return self._seen[id(value)]

    def _new(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        if isinstance(value, dict):
            copied = copy.copy(value)  # with the type and attributes of an OrderedDict
            for key, item in value.items():
                copied[key] = self.of(item)
            return copied
        if type(value) is list:
            return [self.of(item) for item in value]
        if type(value) is tuple:
            return tuple(self.of(item) for item in value)
        return copy.deepcopy(value, self._plain)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return tensor.cpu().clone()
        storage = tensor.untyped_storage()
        # The address of the storage object: empty storages have no address of data.
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = self._buffers.bytes_of(storage)
        host = torch.empty(0, dtype=tensor.dtype)
        return host.set_(self._storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
