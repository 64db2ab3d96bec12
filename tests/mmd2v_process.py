"""The command `mmd2v` as a process of its own, forked from one that has imported what every run needs.

A process that begins with `python -m mmd2v` spends ten seconds importing; what the tests of runs are about comes after
that. That the command itself starts is tested where `python -m mmd2v` stands.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from waiting import LONG, free_port

__all__ = ["MMD2VProcess", "as_if_started", "forked", "run_mmd2v", "start_ranks"]


IMPORTED = ["mmd2v.train.loop", "mmd2v.cli.main", "timm", "transformers.models.auto.modeling_auto"]
"""The last two are imported by the runs that name a model of theirs: most runs of the tests have a teacher of timm. Not
deepspeed: it reads the environment of its rank when it is imported."""


def forked() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes have imported `IMPORTED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class MMD2VProcess:
    """One rank, or a run of one, in a session of its own; its output goes to files."""

    def __init__(self, arguments: Sequence[object], env: Mapping[str, str], cwd: str | Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        parts = (list(map(str, arguments)), dict(env), str(cwd or os.getcwd()), list(map(str, self._outputs)))
        self._process = forked().Process(target=_command, args=parts)
        self._process.start()

    @property
    def pid(self) -> int:
        """Also of the group of it and what it starts."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = LONG) -> int:
        """Wait for the end and return the exit status. Raises TimeoutExpired, after killing it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("mmd2v", timeout, *self.output())
        return self._process.exitcode

    def kill(self) -> None:
        """End it and what it started as `kill -9` does."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    def output(self) -> tuple[str, str]:
        """Return what it has printed so far, and its errors."""
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        return out, err


def run_mmd2v(
    arguments: Sequence[object],
    *,
    env: Mapping[str, str],
    ranks: int = 1,
    cwd: str | Path | None = None,
    timeout: float = LONG,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; with several ranks, as a launcher starts them, the outputs one after the other.

    The exit status is the first that is not 0.
    """
    processes = start_ranks(arguments, env=env, ranks=ranks, cwd=cwd)
    deadline = time.monotonic() + timeout
    statuses = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    out, err = map("".join, zip(*(process.output() for process in processes), strict=True))
    return subprocess.CompletedProcess(["mmd2v", *map(str, arguments)], next(filter(None, statuses), 0), out, err)


def start_ranks(
    arguments: Sequence[object], *, env: Mapping[str, str], ranks: int, cwd: str | Path | None = None
) -> list[MMD2VProcess]:
    """Start the command on several ranks of this machine, as a launcher does."""
    return [MMD2VProcess(arguments, place, cwd) for place in _places(env, ranks)]


def _places(env: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [dict(env)]
    port = free_port()
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{"RANK": rank, "LOCAL_RANK": rank, **common} for rank in range(ranks)]
    return [{**env, **{name: str(value) for name, value in place.items()}} for place in places]


def as_if_started(env: Mapping[str, str]) -> None:
    """Take what a forked process has of the test for what a Python that begins would have."""
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Else workers of a data loader come from a server of their own, which imports everything anew.
    multiprocessing.set_start_method("fork", force=True)


def _command(arguments: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    os.setsid()
    for descriptor, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    as_if_started(env)
    os.chdir(cwd)
    sys.argv = ["mmd2v", *arguments]

    from mmd2v.cli.main import run

    run()
