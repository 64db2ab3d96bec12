"""`mmd2v doctor [--node]`: whether this machine, or every node of a job, is fit to train on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mmd2v.doctor.finding import Subject
from mmd2v.errors import UserError, told_once_a_node

_MORE = """Exit status: 0 fit, 1 not, 2 wrong arguments. Before a run, on all of its nodes:
srun --ntasks-per-node=1 mmd2v doctor --node --config CONFIG.yaml --gpus 8
torchrun --nnodes 2 … -m mmd2v doctor --nodes --config CONFIG.yaml"""


@dataclass(frozen=True)
class Arguments:
    """Check this machine; with --node, every node on which a launcher started this, and the ways between them."""

    # torchrun takes --node for an abbreviation of its own --node-rank, and refuses it even behind the command's name.
    node: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["--nodes"])] = False
    """Meet the other ranks of the job; compare nodes, try links, clocks and the shared run folder; name bad nodes."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="CONFIG.yaml")] = None
    """The run that is to start: its run_dir and engine.device are looked at."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The run's folder, instead of the config's."""
    gpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """GPUs a node should have; none: as many as the other nodes."""
    ranks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes that should meet; none: as many as the launcher says."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 120.0
    """How long to wait for all ranks; those that are missing then are named."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write everything that was found to this file."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v doctor ARGV``; return 0 when all is fit, else 1."""
    arguments = tyro.cli(Arguments, prog="mmd2v doctor", description=f"{Arguments.__doc__}\n\n{_MORE}", args=list(argv))
    try:
        _check(arguments)
        subject = _subject(arguments)
    except UserError as error:
        raise told_once_a_node(error) from None
    # What torch logs of connections that fail, a stack of C++ calls, would hide the line that names the node.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if arguments.node:
        from mmd2v.doctor.node import examine_nodes

        return examine_nodes(subject, ranks=arguments.ranks, timeout=arguments.timeout, json=arguments.json)
    from mmd2v.doctor.alone import examine
    from mmd2v.files import write_json

    found, fit = examine(subject)
    width = max(len(named.check) for named in found)
    print("\n".join(named.lines(width) for named in found))
    print("fit to train on" if fit else "not fit to train on: see the lines with 'error'")
    if arguments.json is not None:
        write_json(arguments.json, {"fit": fit, "found": [named.as_dict() for named in found]})
    return 0 if fit else 1


def _check(arguments: Arguments) -> None:
    from mmd2v.files import check_output

    for flag in ("gpus", "ranks", "timeout"):
        value = getattr(arguments, flag)
        if value is not None and (value < 0 or (flag != "gpus" and value == 0)):
            raise UserError(f"--{flag}: found {value}; expected {'0 or more' if flag == 'gpus' else 'more than 0'}")
    if not arguments.node and arguments.ranks is not None:
        raise UserError("--ranks: only --node meets other ranks; add --node")
    if arguments.json is not None:
        check_output("--json", arguments.json)


def _subject(arguments: Arguments) -> Subject:
    if arguments.config is None:
        return Subject(arguments.run_dir, arguments.gpus)
    from mmd2v.config.load import load_config
    from mmd2v.config.pipeline import is_pipeline, load_pipeline

    if is_pipeline(arguments.config):
        run_dir = load_pipeline(arguments.config)[0].run_dir.parent
        return Subject(arguments.run_dir or run_dir, arguments.gpus)
    config = load_config(arguments.config)
    return Subject(arguments.run_dir or Path(config.run_dir), arguments.gpus, config.engine.device)
