"""The command `mmd2v COMMAND …`. Only the chosen command is imported, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from mmd2v.distributed.launchers import announce
from mmd2v.distributed.preemption import REQUEUE_STATUS, Preempted
from mmd2v.errors import ReportedByMainRank, UserError, disk_message, told_once_a_node, unknown_name
from mmd2v.plugins import load_plugins

USER_ERROR_STATUS = 2
INTERRUPT_STATUS = 130  # what a shell reports for a program that Ctrl-C ended: 128 + SIGINT

GRACE_SECONDS = 5.0
"""A launcher ends all ranks once one has exited: a silent one leaves the other, which tells the error, this much."""


class Command(NamedTuple):
    """Where a command lives and what it does."""

    module: str
    summary: str


COMMANDS = {
    "train": Command(
        "mmd2v.cli.train", "distil teachers into a student: train CONFIG.yaml [--dry-run] [--resume auto]"
    ),
    "data": Command("mmd2v.cli.data", "pack, generate and check shards, build a tokenizer"),
    "eval": Command("mmd2v.cli.eval", "measure an exported encoder, for example its retrieval recall"),
    "table": Command("mmd2v.cli.table", "set results of eval beside the published figures: table RESULTS… --out DIR"),
    "launch": Command(
        "mmd2v.cli.launch", "submit a run to a cluster: launch slurm CONFIG.yaml --nodes N --gpus-per-node G"
    ),
    "export": Command("mmd2v.cli.export", "turn a run's checkpoint into a folder that mmd2v.load reads"),
    "convert": Command("mmd2v.cli.convert", "turn a public data2vec 2.0 or BEiT-2 file into a folder to train from"),
    "embed": Command("mmd2v.cli.embed", "write the embeddings of images or texts to a file"),
    "search": Command("mmd2v.cli.search", "find images of a folder by a sentence or an image"),
    "doctor": Command("mmd2v.cli.doctor", "check this machine, or with --node every node of a job, before training"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mmd2v COMMAND ...",
            "",
            "Distil frozen image and text models into one small encoder for both.",
            "",
            "commands:",
            *lines,
            "",
            "`mmd2v COMMAND --help` tells more about one of them.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names and return the exit status.

    Errors of the input and of the disk are printed without traceback; any other one is a mistake of ours and has it.
    """
    argv = _without_local_rank(argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
            return 0 if argv else USER_ERROR_STATUS
        if argv[0] in ("-V", "--version"):
            from mmd2v import __version__

            print(f"mmd2v {__version__}")
            return 0
        announce()
        if argv[0] not in COMMANDS:
            raise told_once_a_node(unknown_name("mmd2v", argv[0], COMMANDS))
        load_plugins()
        return importlib.import_module(COMMANDS[argv[0]].module).main(argv[1:])
    except KeyboardInterrupt:
        return INTERRUPT_STATUS
    except Preempted as stop:
        # Both signals are ignored from here to the end of the process (see StopSignals): the status is to be this one.
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return REQUEUE_STATUS
    except ReportedByMainRank:
        time.sleep(GRACE_SECONDS)
        return USER_ERROR_STATUS
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error: {message}" if rank == "0" else f"error (rank {rank}): {message}", file=sys.stderr)
        return USER_ERROR_STATUS


def _message(error: Exception) -> str | None:
    """Return what to tell the user of an error that is not a mistake of ours, else None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file could not be read or written'}: {disk_message(error)}"
    safetensors = sys.modules.get("safetensors")  # whose error type can be met only if a command has imported it
    if safetensors is not None and isinstance(error, safetensors.SafetensorError):
        return f"a safetensors file could not be read or written: {error}"
    return None


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop ``--local_rank=N``, which the deepspeed launcher puts first; the environment says the same."""
    return [argument for argument in argv if not argument.startswith(("--local_rank=", "--local-rank="))]


def run() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files and archive members may be no text in the terminal's encoding: no reason to stop.
            stream.reconfigure(errors="backslashreplace")
    status = main(sys.argv[1:])
    if status:
        _leave_at_once(status)
    sys.exit(status)


def _leave_at_once(status: int) -> None:
    """Exit without the interpreter's tear-down if ranks are still joined.

    Threads of gloo that then lose their peers abort the process, and its status with it. Leaving the group in order
    would wait for ranks that may be gone.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    from mmd2v.distributed.processes import kill_loader_processes

    kill_loader_processes()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe has no reader to care
            stream.flush()
    os._exit(status)
