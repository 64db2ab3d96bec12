"""What both measured trainers of throughput.py have in common: requests, clocks, memory and arithmetic.

Imports torch and the standard library alone: one of the processes runs in the peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1] / "data"))
from child import settle

KERNELS = "MMD2V_KERNELS"
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
PRODUCT_SECONDS = 1.0
LONG_PRODUCT = 0.05  # seconds: no larger one is needed, and a processor without bf16 would take minutes for it


class Channel:
    """Requests come as lines of JSON on stdin, each answered by one on stdout."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever else is printed must not mix with the answers

    def answer(self, value: Any) -> None:
        """Send a result."""
        print(json.dumps(value), file=self._answers, flush=True)

    def read(self) -> dict[str, Any]:
        """Return the next request. Leaves the process when there is none any more: who asked is gone."""
        line = sys.stdin.readline()
        if not line:
            sys.exit("stopped: nobody asks any more")
        return json.loads(line)


class Window:
    """Measures a number of steps: seconds, of them in data and teacher, samples, tokens, peak memory.

    The first ``uncounted`` steps of a window are not measured: they use up what loaders made in a pause.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.data, self.samples, self.tokens, self._teacher = 0.0, 0, 0, 0.0
        self._events: list[tuple[Any, Any]] = []
        self._start = time.perf_counter()

    def begin(self) -> None:
        """Start the clock, when the device has done all that it was given."""
        synchronize(self.device)
        reset_peak(self.device)
        self.reset()

    def end(self, steps: int) -> dict[str, float]:
        """Stop it, when the device has done the same, and wait for the loader's processes to come to rest."""
        synchronize(self.device)
        seconds = time.perf_counter() - self._start
        teacher = self._teacher + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        measured = {"steps": steps, "seconds": seconds, "data": self.data, "teacher": teacher}
        measured |= {"samples": self.samples, "tokens": self.tokens, "peak": peak(self.device)}
        settle()
        return measured

    def batches(self, source: Iterator[Any], count: Callable[[Any], tuple[int, int]]) -> Iterator[Any]:
        """Pass batches on; ``count`` gives the samples and tokens of one. Time inside ``source`` is that of data."""
        while True:
            asked = time.perf_counter()
            batch = next(source)
            self.data += time.perf_counter() - asked
            samples, tokens = count(batch)
            self.samples += samples
            self.tokens += tokens
            yield batch

    @contextmanager
    def in_teacher(self) -> Iterator[None]:
        """Count what is inside as the teacher's, on a GPU by events: nothing waits for it."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._teacher += time.perf_counter() - start


def reset_peak(device: torch.device) -> None:
    """Let the peak memory begin at what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: the allocator's on CUDA, else the process's own (not its loader's processes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of all matrix products and convolutions inside, forward and backward.

    Attention is computed as plain products meanwhile, and kernels of ours by their references: torch knows neither's
    operations otherwise. A multiplication and an addition count as two.
    """
    before = os.environ.get(KERNELS)
    os.environ[KERNELS] = "reference"
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        if before is None:
            del os.environ[KERNELS]
        else:
            os.environ[KERNELS] = before


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a bare product of two large square matrices: the best of a second."""
    side = 256
    while (seconds := _fastest_product(side, device, dtype, 0.0)) < LONG_PRODUCT and side < PRODUCT_SIDE[device.type]:
        side *= 2
    return 2 * side**3 / min(seconds, _fastest_product(side, device, dtype, PRODUCT_SECONDS))


def _fastest_product(side: int, device: torch.device, dtype: torch.dtype, duration: float) -> float:
    """Seconds of the fastest product of those that begin within ``duration``, after one that is not counted."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + duration
    left @ right
    while True:
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
