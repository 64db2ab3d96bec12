"""One compiled form of a Triton kernel, named, so that launches and ahead-of-time tests use the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TRITON_NAMES", "Configuration"]

TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""How Triton names torch's dtypes."""


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
