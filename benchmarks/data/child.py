"""What both measured processes have in common: they read requests from stdin and answer each with one line of JSON.

Imports nothing but the standard library: one of the processes runs in the peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A measurement: samples, seconds, seconds of processor time (its children's included)
Measured = tuple[int, float, float]
TICKS = os.sysconf("SC_CLK_TCK")


def serve(operations: dict[str, Callable[..., Any]]) -> None:
    """Answer requests ``{"operation": NAME, ...arguments}`` until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        result = operations[request.pop("operation")](**request)
        print(json.dumps(result), file=answers, flush=True)


def processor_seconds() -> float:
    """User and system time of this process and of its living children."""
    return sum(own_seconds(process) for process in ("self", *children()))


def children() -> list[str]:
    tasks = Path("/proc/self/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def own_seconds(process: str) -> float:
    # The name, in brackets, may hold spaces.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def settle(limit: float = 20.0) -> None:
    """Wait until loader processes have filled their queues: they would disturb the next measurement."""
    before, end = processor_seconds(), time.perf_counter() + limit
    while time.perf_counter() < end:
        time.sleep(0.2)
        now = processor_seconds()
        if now - before < 1.5 / TICKS:
            return
        before = now


class LoaderRate:
    """Samples a second of a loader that is kept between measurements.

    Its process stops when its queue is full, so each measurement first throws away what was made in the pause.
    """

    def __init__(self, open_loader: Callable[[], Iterator[Any]], size: Callable[[Any], int], queued: int) -> None:
        self.open_loader, self.size, self.queued = open_loader, size, queued
        self.batches: Iterator[Any] | None = None

    def __call__(self, seconds: float) -> Measured:
        if self.batches is None:
            self.batches = self.open_loader()
        for _ in range(self.queued + 2):
            next(self.batches)
        processor, start, samples = processor_seconds(), time.perf_counter(), 0
        now = start
        while now - start < seconds:
            samples += self.size(next(self.batches))
            now = time.perf_counter()
        measured = samples, now - start, processor_seconds() - processor
        settle()
        return measured


def repeat(work: Callable[[int], Any], seconds: float) -> Measured:
    """Call ``work(0)``, ``work(1)``, … for at least ``seconds``; each call is a sample."""
    processor, start, samples = time.process_time(), time.perf_counter(), 0
    now = start
    while now - start < seconds:
        work(samples)
        samples += 1
        now = time.perf_counter()
    return samples, now - start, time.process_time() - processor
