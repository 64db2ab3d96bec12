"""`mmd2v train CONFIG.yaml [--dry-run] [--resume auto|PATH] [--any.config.key VALUE …]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from mmd2v.config.load import load_config
from mmd2v.config.overrides import split_overrides
from mmd2v.config.pipeline import Stage, is_pipeline, load_pipeline
from mmd2v.config.schema import Config
from mmd2v.distributed.preemption import Preempted, StopSignals
from mmd2v.errors import UserError, told_once_a_node

_OWN_FLAGS = {"--dry-run": False, "--resume": True, "--scale": True, "--help": False}
"""Flags of the command itself → whether a value follows. Everything else overrides a key of the config."""

_MORE = """Any key of the config can be set as --a.b VALUE, list items as --model.layers.0.count 3.
Runs alone, or under a launcher: deepspeed --num_accelerators 2 --module mmd2v train CONFIG.yaml
SIGTERM and SIGUSR1 make it save and exit with status 75: run the same command again with --resume auto."""


@dataclass
class Arguments:
    """Train a student from a config."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.yaml")]
    """YAML file that describes the run, or the stages of a pipeline."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print config, parameter counts, batch arithmetic and memory, run one mock step, and touch no file."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="auto|PATH")] = None
    """`auto`: continue from the newest checkpoint of run_dir, if any; or the path of a checkpoint or run."""
    scale: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """One of the config's `scales`, such as `mini`: the same run at another size."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    own, overrides = split_overrides(argv, _OWN_FLAGS)
    arguments = tyro.cli(Arguments, prog="mmd2v train", description=f"{Arguments.__doc__}\n\n{_MORE}", args=own)
    try:
        stages = load_pipeline(arguments.config, overrides, arguments.scale) if is_pipeline(arguments.config) else None
        config = None if stages else load_config(arguments.config, overrides, arguments.scale)
        if stages and arguments.resume not in (None, "auto"):
            raise UserError("--resume: a pipeline goes on by itself; expected nothing, or auto")
    except UserError as error:
        raise told_once_a_node(error) from None
    if arguments.dry_run:
        _dry_run(config, stages)
    else:
        # From here on, before torch is even imported: a signal is answered once all ranks have met.
        with StopSignals():
            _train(config, stages, arguments.resume)
    return 0


def _dry_run(config: Config | None, stages: list[Stage] | None) -> None:
    from mmd2v.distributed.environment import shutdown

    if stages is not None:
        from mmd2v.train.pipeline import dry_run_pipeline

        dry_run_pipeline(stages)
    elif config is not None:
        from mmd2v.train.dry_run import dry_run

        dry_run(config)
    shutdown()


def _train(config: Config | None, stages: list[Stage] | None, resume: str | None) -> None:
    from mmd2v.distributed.environment import shutdown

    try:
        if stages is not None:
            from mmd2v.train.pipeline import run_pipeline

            run_pipeline(stages)
        elif config is not None:
            from mmd2v.train.loop import train

            train(config, resume)
    except Preempted:
        shutdown()  # all ranks leave together
        raise
    shutdown()
