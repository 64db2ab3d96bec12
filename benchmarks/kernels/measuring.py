"""What the kernel benchmarks have in common: time, memory, and the CSV they write."""

from __future__ import annotations

import csv
import ctypes
import io
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    kernel: str
    provider: str
    mode: str
    """fwd, bwd or fwd+bwd"""
    dtype: str
    shape: str
    repeats: int
    p50_ms: float
    p20_ms: float
    p80_ms: float
    peak_extra_mb: float
    saved_mb: float
    """Kept from forward to backward, weights left out."""
    floor_ms: float
    """The least time: that of the arithmetic or of the memory traffic alone."""
    percent_of_floor: float
    error: float
    """Root mean square, relative, of the output against float64."""
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    commit: str


HEADER = ",".join(field.name for field in fields(Row))


def times_ms(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time the calls in turn, so that all meet the same machine; the order changes from round to round."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(_cuda_ms(calls[name]) if device.type == "cuda" else _cpu_ms(calls[name]))
    return found


def _cpu_ms(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return 1000 * (perf_counter() - start)


def _cuda_ms(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)  # ten milliseconds of backlog: launches run ahead of the device and cost it no time
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def percentiles(taken: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentile."""
    p20, _, _, p80 = quantiles(taken, n=5, method="inclusive")
    return median(taken), p20, p80


def peak_extra_megabytes(call: Callable[[], object], device: torch.device) -> float:
    """Call once and return the most memory it took beyond what was there (CPU: Linux, glibc)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would otherwise serve this one uncounted
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    before = _kibibytes("VmRSS")
    call()
    return max(0, _kibibytes("VmHWM") - before) * 1024 / 1e6


def _kibibytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def saved_megabytes(forward: Callable[[], object], weights: set[int]) -> float:
    """Return what ``forward`` keeps for its backward pass; ``weights`` are data pointers that do not count."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
        total = sum(storages.values()) / 1e6
    del kept
    return total


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference relative to that of the exact value; NaN stays NaN."""
    difference = found.double() - exact.double()
    return float(difference.square().mean().sqrt() / exact.double().square().mean().sqrt())


def machine(device: torch.device) -> dict[str, str | int]:
    """Return what a reader must know of where a row comes from; the names are those of `Row`."""
    from mmd2v_kernels.dispatch import triton_version

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version() or "",
        "commit": _commit(),
    }


def _processor() -> str:
    """As mmd2v.report.machine, which is not there where only torch is installed."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    fields_of = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields_of.items()}
    flags = found.get("flags", "").split()
    return " ".join([found.get("model name", "unknown"), *(f for f in ("amx_bf16", "avx512_bf16") if f in flags)])


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def append(path: Path, rows: list[Row]) -> None:
    """Add rows to a CSV, by a temporary file. Raises ValueError if it has other columns."""
    old = path.read_text(encoding="utf-8") if path.exists() else HEADER + "\n"
    if not old.startswith(HEADER + "\n"):
        raise ValueError(f"{path} has other columns, expected {HEADER}")
    writer = csv.writer(new := io.StringIO(), lineterminator="\n")
    for row in rows:
        writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in asdict(row).values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(old + new.getvalue(), encoding="utf-8")
    temporary.replace(path)
