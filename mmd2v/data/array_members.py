"""Arrays beside a sample's image and captions: members ``ID.KEY`` in NumPy's format, such as spectrogram patches.

Shapes: M array members of a shard, R its samples (rows).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmd2v.config.schema import ArrayConfig
from mmd2v.data.damage import Damage, DamageKind

if TYPE_CHECKING:
    import torch

_SUFFIX = "npy"


def is_array_key(suffix: str) -> bool:
    """Whether a member's extension (lower case, from the first dot on) is that of an array: ``npy`` or ``NAME.npy``."""
    return suffix == _SUFFIX or suffix.endswith(f".{_SUFFIX}")


class ArrayMembers:
    """Where the arrays of one shard lie; a shard without any takes next to no memory.

    Attributes:
        table: int64 [M, 4], sorted by row: row, number of the key, byte offset, size.
        keys: the keys, by number.
    """

    def __init__(self, table: np.ndarray, keys: Sequence[str]) -> None:
        self.table = table
        self.keys = tuple(keys)

    def of(self, row: int) -> dict[str, tuple[int, int]]:
        """Key → (offset, size) of a sample's arrays."""
        first, last = np.searchsorted(self.table[:, 0], [row, row + 1])
        return {self.keys[key]: (offset, size) for _, key, offset, size in self.table[first:last].tolist()}

    def tensors(self) -> dict[str, np.ndarray]:
        """What an index file holds of them: nothing when there are none."""
        if not len(self.table):
            return {}
        blob = "\0".join(self.keys).encode("utf-8", "surrogateescape")
        return {"arrays": np.ascontiguousarray(self.table), "array_keys": np.frombuffer(blob, np.uint8)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, np.ndarray], rows: int) -> ArrayMembers:
        """Read what `tensors` wrote, for a shard of R samples. Raises ValueError for anything else."""
        if "arrays" not in tensors:
            return cls.none()
        table, blob = tensors["arrays"], tensors["array_keys"]
        if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 4 or blob.dtype != np.uint8:
            raise ValueError("another version")
        keys = bytes(blob).decode("utf-8", "surrogateescape").split("\0")
        if (table < 0).any() or (table[:, 0] >= rows).any() or (table[:, 1] >= len(keys)).any():
            raise ValueError("places outside the shard")
        if (np.diff(table[:, 0]) < 0).any():
            raise ValueError("rows out of order")
        return cls(table, keys)

    @classmethod
    def none(cls) -> ArrayMembers:
        """Of a shard without arrays."""
        return cls(np.zeros((0, 4), np.int64), ())


class ArrayScan:
    """Collects the arrays of a shard while its headers are read in their order."""

    def __init__(self) -> None:
        self._table: list[tuple[int, int, int, int]] = []
        self._keys: dict[str, int] = {}
        self._owner = ""
        self._waiting: list[tuple[str, int, int]] = []

    def found(self, owner: str, row: int | None, key: str, offset: int, size: int) -> None:
        """Note an array of the sample with the key ``owner``; ``row`` is None as long as it has no other member."""
        if self._owner != owner:
            self._waiting = []
        self._owner = owner
        if row is None:
            self._waiting.append((key, offset, size))
        else:
            self._table.append((row, self._keys.setdefault(key, len(self._keys)), offset, size))

    def started(self, owner: str, row: int) -> None:
        """Give the arrays right in front of a sample's first other member to that sample."""
        waiting = self._waiting if self._owner == owner else []
        self._waiting = []
        for key, offset, size in waiting:
            self.found(owner, row, key, offset, size)

    def members(self, rows: int) -> ArrayMembers:
        """What was found of the first ``rows`` samples."""
        kept = [entry for entry in self._table if entry[0] < rows]
        return ArrayMembers(np.array(kept, np.int64).reshape(len(kept), 4), tuple(self._keys))


def parse_array(data: memoryview, config: ArrayConfig, where: str) -> torch.Tensor:
    """Decode an array to float32 of the configured shape.

    Nothing is allocated before the header has been compared with the config, and no pickle is read.

    Raises:
        Damage: no .npy of floats in that shape, cut off, or with a value that is not finite; starts with ``where``.
    """
    problem = next(_problems(data, config), None)
    if problem is not None:
        raise Damage(DamageKind.BAD_ARRAY, f"{where}: its .{config.key} {problem}")
    order, dtype, start = _header(data)
    with np.errstate(over="ignore"):
        values = np.frombuffer(data, dtype, offset=start).reshape(config.shape, order=order).astype(np.float32, "C")
    if not np.isfinite(values).all():
        raise Damage(DamageKind.BAD_ARRAY, f"{where}: its .{config.key} holds a number that is not finite in float32")
    import torch  # slow to import, and the index of shards, which every command of data reads, needs none

    return torch.from_numpy(values)


def _problems(data: memoryview, config: ArrayConfig) -> Iterator[str]:
    """What is wrong with an array before its values are looked at; nothing if all is well."""
    try:
        shape, _, dtype, start = _read_header(data)
    except (ValueError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        yield f"is no NumPy array: {first_line}"
        return
    if dtype.kind != "f":
        yield f"is of type {dtype}, expected floats"
    if shape != config.shape:
        yield f"has shape {list(shape)}, expected {list(config.shape)} (data.arrays)"
    if len(data) - start != dtype.itemsize * math.prod(shape):
        found, expected = len(data) - start, dtype.itemsize * math.prod(shape)
        yield f"has {found:,} bytes of values, expected {expected:,}: incomplete copy?"


def _header(data: memoryview) -> tuple[str, np.dtype, int]:
    _, is_fortran, dtype, start = _read_header(data)
    return "F" if is_fortran else "C", dtype, start


def _read_header(data: memoryview) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns are contiguous, type, and where the values start."""
    stream = io.BytesIO(data[: 1 << 16])  # numpy's own limit for a header is 10,000 bytes
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its format is version {version}, expected 1.0 or 2.0")
    shape, is_fortran, dtype = readers[version](stream)
    return shape, is_fortran, dtype, stream.tell()
