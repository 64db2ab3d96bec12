"""Cores, memory and limits of this machine."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

import psutil

from mmd2v.doctor.finding import Check, Finding, Subject

GIGABYTE = 1e9
_LITTLE_MEMORY, _NO_MEMORY = 4 * GIGABYTE, 0.5 * GIGABYTE
_FEW_FILES = 4096
_INFINIBAND = Path("/sys/class/infiniband")
_CGROUP = Path("/sys/fs/cgroup")


def machine_checks() -> list[Check]:
    """Return the checks of what a node offers to processes."""
    return [
        Check("cores", cores),
        Check("memory", memory),
        Check("open files", open_files),
        Check("locked memory", locked_memory),
    ]


def cores(subject: Subject) -> Finding:
    """Check that every rank of the node has a core; a scheduler may give a task fewer than the node has."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{usable} usable of {os.cpu_count()}"
    ranks = max(subject.ranks, subject.gpus or 0)
    if usable < ranks:
        hint = "ask the scheduler for more, such as srun --cpus-per-task"
        return Finding("warning", f"{found}, for {ranks} ranks", hint, f"{usable} cores")
    return Finding("ok", found, short=f"{usable} cores")


def memory(subject: Subject) -> Finding:
    """Check the memory that is free, within the limit of the container or job if there is one."""
    return memory_finding(psutil.virtual_memory().available, *_limit_and_use(_CGROUP))


def memory_finding(available: float, limit: float = math.inf, used: float = 0.0) -> Finding:
    """Judge ``available`` bytes of the machine under a control group's ``limit`` of which ``used`` are taken."""
    free = min(available, limit - used)
    of = "" if limit == math.inf else f" (this job may use {limit / GIGABYTE:.1f} GB)"
    found, short = f"{free / GIGABYTE:.1f} GB free{of}", f"{free / GIGABYTE:.0f} GB"
    hint = "end what else runs there, or ask the scheduler for more memory"
    if free < _NO_MEMORY:
        return Finding("error", found, hint, short)
    return Finding("warning", found, hint, short) if free < _LITTLE_MEMORY else Finding("ok", found, short=short)


def open_files(subject: Subject) -> Finding:
    """Check how many files a process may have open: shards, sockets and batches of loader processes are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return Finding("warning", f"a process may open {soft}", f"ulimit -n {_number(hard)} before the run")
    return Finding("ok", f"a process may open {_number(soft)}")


def locked_memory(subject: Subject) -> Finding:
    """Check that memory can be pinned for InfiniBand, where there is one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    fast = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    if not fast:
        return Finding("ok", f"limit {_number(soft)}; no InfiniBand here")
    if soft != resource.RLIM_INFINITY:
        hint = "set memlock to unlimited, for SLURM in slurmd's own limits: RDMA pins memory"
        return Finding("warning", f"limit {soft} bytes, with InfiniBand ({', '.join(fast)})", hint)
    return Finding("ok", f"unlimited, with InfiniBand ({', '.join(fast)})")


def _limit_and_use(folder: Path) -> tuple[float, float]:
    """Limit and use in bytes of the control group this process sees as its root; infinity without a limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        return (math.inf, 0.0) if limit == "max" else (float(limit), float((folder / "memory.current").read_text()))
    except (OSError, ValueError):
        return math.inf, 0.0


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
