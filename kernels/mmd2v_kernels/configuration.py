"""One compiled form of a Triton kernel, named, so that launches and ahead-of-time tests use the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NORM_ROWS", "TRITON_NAMES", "Configuration", "norm_block"]

TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""How Triton names torch's dtypes."""

NORM_ROWS = 4
"""Rows that a program of a norm takes at a time: up to width 1024 a warp each, so that sums of a row stay within it."""


def norm_block(width: int) -> tuple[int, int]:
    """Return the width up to a power of two, and the warps of a program of a norm: 32 elements a thread."""
    block = 1 << max(0, width - 1).bit_length()
    return block, max(NORM_ROWS, min(16, NORM_ROWS * block // 1024))


@dataclass(frozen=True)
class Configuration:
    """What `triton.compile` needs, and what is expected of the result."""

    name: str
    kernel: Any
    """The function under ``@triton.jit``."""
    signature: Mapping[str, str]
    """Argument → type, such as ``*bf16`` or ``i32``; ``constexpr`` for those in ``constants``."""
    constants: Mapping[str, Any]
    warps: int
    stages: int = 3
    tensor_cores: bool = False
    """It must hold matrix instructions."""
    aligned: tuple[str, ...] = field(default=())
    """Arguments that are multiples of 16 (pointers always are)."""

    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Return what Triton's launcher would find out of such arguments."""
        names = list(self.signature)
        known = [n for n, kind in self.signature.items() if kind.startswith("*") or n in self.aligned]
        return {(names.index(name),): [["tt.divisibility", 16]] for name in known}
