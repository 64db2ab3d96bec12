"""What a reader of a measurement must know of the machine, without its name."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor with the extensions that decide the speed of bf16 products."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return " ".join([fields.get("model name", "unknown"), *(f for f in ("amx_bf16", "avx512_bf16") if f in flags)])
