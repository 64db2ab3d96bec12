"""Run a function on several ranks, each a fresh process, and get their results or one readable failure.

On the CPU the processes are forked from one that has imported what every run needs and done nothing else: importing it
anew took most of the time of a test. With CUDA they are spawned.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
from mmd2v_process import as_if_started, forked
from waiting import LONG, free_port


def run_distributed_test(
    fn: Callable[..., Any], world_size: int = 2, backend: str = "gloo", *, args: tuple = (), timeout: float = 2 * LONG
) -> list[Any]:
    """Call ``fn(*args)`` in ``world_size`` fresh processes that form one group; return the results by rank.

    ``fn`` is a module-level function; it runs after `mmd2v.distributed.environment.initialize`. When a rank raises,
    dies or is late, the test fails with the traceback of every rank that has one, and all ranks are ended.
    """
    context = multiprocessing.get_context("spawn") if backend == "nccl" else forked()
    port = free_port()
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(fn, args, dict(os.environ), rank, world_size, backend, port, theirs)
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    outcomes: list[tuple[bool, Any] | None] = []
    try:
        outcomes = _collect(ranks, time.monotonic() + timeout)
    finally:
        for process, connection in ranks:
            process.join(10 if outcomes and all(outcome and outcome[0] for outcome in outcomes) else 0)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
    failures = []
    for rank, ((process, _), outcome) in enumerate(zip(ranks, outcomes, strict=True)):
        if outcome is None:
            failures.append(f"rank {rank}: no answer within {timeout} s or died (exit code {process.exitcode})")
        elif not outcome[0]:
            failures.append(f"rank {rank}:\n{outcome[1]}")
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return [outcome[1] for outcome in outcomes if outcome]


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[tuple[bool, Any] | None]:
    """Wait for an outcome of every rank; soon after the first failure, stop waiting for the others."""
    outcomes: list[tuple[bool, Any] | None] = [None] * len(ranks)
    while time.monotonic() < deadline and any(outcome is None for outcome in outcomes):
        for rank, (process, connection) in enumerate(ranks):
            if outcomes[rank] is None and connection.poll(0.05):
                try:
                    outcomes[rank] = connection.recv()
                except EOFError:
                    process.join(5)
                    outcomes[rank] = (False, f"died without a word (exit code {process.exitcode})")
                if not outcomes[rank][0]:
                    deadline = min(deadline, time.monotonic() + 5)
    return outcomes


def _run(
    fn: Callable[..., Any],
    args: tuple,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    backend: str,
    port: int,
    out: Connection,
) -> None:
    as_if_started(environment)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        import torch

        from mmd2v.distributed.environment import initialize

        torch.set_num_threads(1)
        initialize("cuda" if backend == "nccl" else "cpu")
        result = fn(*args)
    except BaseException:
        out.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    out.send((True, result))
    out.close()
