"""The flat memory that tensors of a checkpoint are views of, with every size checked before it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class Storage:
    """One storage of a file."""

    flat: torch.Tensor
    """[elements]"""

    def tensor(self, offset: Any, size: Any, stride: Any) -> torch.Tensor:
        """Return the view a file asks for. Raises ValueError when it does not lie inside the storage."""
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
            raise ValueError("a tensor has a shape that is none")
        count = 1
        for length in size:
            count *= length
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        # More elements than there are: a stride of 0 would let some bytes claim to be terabytes.
        if count > len(self.flat) or (count and last >= len(self.flat)):
            raise ValueError(f"a tensor of shape {tuple(size)} reaches beyond its storage of {len(self.flat)} elements")
        return self.flat.as_strided(tuple(size), tuple(stride), offset if count else 0)

    def part(self, offset: Any, length: Any) -> Storage:
        """Return the storage of ``length`` elements from ``offset`` on."""
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= len(self.flat):
            raise ValueError("a storage reaches beyond the one it is part of")
        return Storage(self.flat[offset : offset + length])


def storage_bytes(kind: torch.dtype, count: Any) -> int:
    """Return the size of ``count`` elements in bytes. Raises ValueError for a count that is none."""
    if type(count) is not int or count < 0:
        raise ValueError("a storage has a length that is none")
    return count * kind.itemsize


def typed(memory: bytearray, kind: torch.dtype) -> Storage:
    """Return the storage of the elements in ``memory``, without a copy."""
    return Storage(torch.frombuffer(memory, dtype=kind) if memory else torch.empty(0, dtype=kind))
