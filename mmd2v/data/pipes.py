"""``pipe:COMMAND`` addresses: a shard is what a command, or several chained by ``|``, write. No shell is involved."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import IO

from mmd2v.data.addresses import PIPE, display, display_command, redacted
from mmd2v.errors import UserError

_STDERR_TAIL = 500  # characters of a stage's stderr that a message shows
_ROOM = 1 << 20  # bytes that the disk of the target must still have room for when a stage failed
_SHELL_ONLY = {"&&", "||", ";", "&", ">", ">>", "<", "2>", "2>&1"}


class PipeFailed(Exception):
    """A stage ended with another status than 0."""


def pipe_stages(address: str) -> list[list[str]]:
    """Split ``pipe:a b | c`` into its stages' arguments.

    Raises:
        UserError: a stage is empty, a quote is open, or a word means something to a shell alone.
    """
    try:
        words = shlex.split(address.removeprefix(PIPE))
    except ValueError as error:
        raise UserError(f"{display(address)}: {error}") from None
    stages: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            stages.append([])
        elif word in _SHELL_ONLY:
            raise UserError(
                f"{display(address)}: found '{word}', but the command runs without a shell; only | chains commands"
            )
        else:
            stages[-1].append(word)
    if not all(stages):
        raise UserError(f"{display(address)}: found an empty command, expected pipe:COMMAND, or pipe:COMMAND | COMMAND")
    return stages


def run_pipe(address: str, target: str, follow: Callable[[Callable[[float], bool]], None]) -> None:
    """Run the stages and let the last one write to the file ``target``.

    Args:
        address: see `pipe_stages`.
        target: local file.
        follow: called with a function that waits so many seconds and tells whether all stages have ended; it may raise
            to give up, and then they are killed.

    Raises:
        UserError: a program is missing or may not be run.
        PipeFailed: a stage failed; names it, with the end of its stderr.
        OSError: ``target`` cannot be written, or its disk is full.
    """
    stages = pipe_stages(address)
    running: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(target, "wb"))
        complaints: list[IO[bytes]] = [stack.enter_context(tempfile.TemporaryFile()) for _ in stages]
        try:
            _start(address, stages, running, output, complaints)
            follow(lambda seconds: _ended(running, seconds))
        except BaseException:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in running:
                process.wait()
            raise
        failed = [place for place, process in enumerate(running) if process.returncode != 0]
        # A stage whose reader went away is ended by a signal: what matters is why its reader did.
        failed = [place for place in failed if running[place].returncode != -signal.SIGPIPE] or failed
        if failed:
            _check_room(output)
            stage, status, complaint = stages[failed[0]], running[failed[0]].returncode, complaints[failed[0]]
            raise PipeFailed(f"`{display_command(stage)}` ended with status {status}{_tail(complaint)}")


def _start(
    address: str,
    stages: list[list[str]],
    running: list[subprocess.Popen[bytes]],
    output: IO[bytes],
    complaints: list[IO[bytes]],
) -> None:
    source: IO[bytes] | None = None
    for place, (stage, complaint) in enumerate(zip(stages, complaints, strict=True)):
        last = place == len(stages) - 1
        try:
            process = subprocess.Popen(
                stage,
                stdin=subprocess.DEVNULL if source is None else source,
                stdout=output if last else subprocess.PIPE,
                stderr=complaint,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{display(address)}: '{stage[0]}' cannot be run: {error.strerror}") from None
        finally:
            if source is not None:
                source.close()  # this process must not keep a stage from seeing that its reader is gone
        running.append(process)
        source = process.stdout
    assert source is None


def _ended(running: list[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Wait for at most so many seconds; whether all have ended."""
    for process in running:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
    return True


def _check_room(output: IO[bytes]) -> None:
    """Raise the OSError of a full disk or quota, which a program that met it only tells in words."""
    output.seek(0, os.SEEK_END)
    output.write(bytes(_ROOM))
    output.flush()
    os.fsync(output.fileno())


def _tail(complaint: IO[bytes]) -> str:
    size = complaint.seek(0, os.SEEK_END)
    complaint.seek(max(0, size - _STDERR_TAIL))
    text = " ".join(complaint.read().decode("utf-8", "replace").split())
    return f": {redacted(text)}" if text else ""
