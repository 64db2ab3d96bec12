"""`mmd2v launch slurm CONFIG --nodes N --gpus-per-node G`: write a job that survives preemption, and submit it."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from mmd2v.config.batch_plan import plan_batches
from mmd2v.config.load import load_config
from mmd2v.config.overrides import split_overrides
from mmd2v.config.pipeline import is_pipeline, load_pipeline
from mmd2v.errors import UserError, unknown_name
from mmd2v.launch.job import Job, Resources
from mmd2v.launch.slurm import check_not_active, script_of, submit, what_to_know, write_script

AUTO = "auto"
_SWITCHES = ("--check", "--no-check", "--submit", "--no-submit", "--help")
_VALUES = (
    "--nodes",
    "--gpus-per-node",
    "--ranks-per-node",
    "--cpus-per-task",
    "--cpus-per-gpu",
    "--partition",
    "--account",
    "--qos",
    "--constraint",
    "--reservation",
    "--exclude",
    "--mem",
    "--time",
    "--signal-seconds",
    "--container",
    "--setup",
    "--resume",
    "--scale",
)
_OWN_FLAGS = dict.fromkeys(_SWITCHES, False) | dict.fromkeys(_VALUES, True)
"""Flags of the command itself → whether a value follows. Everything else overrides a key of the config."""

_MORE = """Any key of the config can be set as --a.b VALUE, as with `mmd2v train`; all behind a bare -- is of this kind.
The job is written to job.sbatch in the run directory, and can be submitted again with sbatch."""


@dataclass(frozen=True)
class Slurm:
    """Submit a run to SLURM: a job that saves and queues itself again when the cluster takes its nodes back."""

    config: Annotated[Positional[str], arg(metavar="CONFIG.yaml")]
    """YAML file that describes the run, or the stages of a pipeline."""
    nodes: int
    """Nodes of the job."""
    gpus_per_node: Annotated[int, arg(metavar="G")]
    """GPUs of each node, one rank a GPU; 0 on a cluster without."""
    ranks_per_node: int | None = None
    """Ranks on each node without GPUs; by default one."""
    cpus_per_task: Annotated[int | None, arg(aliases=["--cpus-per-gpu"])] = None
    """CPU cores of each rank, so of each GPU; its loader's workers run on them. By default the cluster's, often one."""
    partition: str | None = None
    """Partition (queue) of the cluster."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: Annotated[str | None, arg(metavar="NODES")] = None
    """Nodes to stay away from, such as one that the check named."""
    mem: Annotated[str | None, arg(metavar="SIZE")] = None
    """Memory of each node, such as 200G."""
    time: str | None = None
    """Time limit, minutes or [days-]hours:minutes:seconds; the run goes on in a new start when it has passed."""
    signal_seconds: int = 120
    """Notice before the time limit, at which the run saves; longer than two steps and two saves take."""
    container: Annotated[str | None, arg(metavar="IMAGE")] = None
    """Apptainer (Singularity) image with mmd2v in it, a file or docker://NAME:TAG."""
    setup: Annotated[Path | None, arg(metavar="FILE")] = None
    """Shell file that is sourced first: `module load …`, NCCL_* and proxies."""
    resume: Annotated[str, arg(metavar="auto|PATH")] = AUTO
    """`auto`: go on from the newest checkpoint of the run, if any; a path: until it has one, start from that one."""
    scale: Annotated[str | None, arg(metavar="NAME")] = None
    """One of the config's `scales`."""
    check: bool = True
    """Check every node (`mmd2v doctor --node`) before training starts."""
    submit: bool = True
    """Hand the job to sbatch; otherwise it is written and printed."""


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v launch ARGV`` and return the exit status."""
    schedulers = {"slurm": _slurm}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: mmd2v launch slurm CONFIG.yaml --nodes N --gpus-per-node G ...\n\n{__doc__}")
        return 0 if argv else 2
    if argv[0] not in schedulers:
        raise unknown_name("mmd2v launch", argv[0], schedulers)
    return schedulers[argv[0]](argv[1:])


def _slurm(argv: Sequence[str]) -> int:
    end = list(argv).index("--") if "--" in argv else len(argv)
    own, overrides = split_overrides(argv[:end], _OWN_FLAGS)
    overrides += argv[end + 1 :]
    command = tyro.cli(Slurm, prog="mmd2v launch slurm", description=f"{Slurm.__doc__}\n\n{_MORE}", args=own)
    job = describe_job(command, overrides)
    script_of(job)  # says what is wrong before a folder is made
    if command.submit:
        check_not_active(job)
    script = write_script(job)
    if not command.submit:
        print(f"{script}, which is not submitted:\n\n{script.read_text(encoding='utf-8')}", end="")
        return 0
    print(what_to_know(job, submit(script)))
    return 0


def describe_job(command: Slurm, overrides: Sequence[str]) -> Job:
    """Return the job of a command line. Raises UserError for what is wrong with the config at that many ranks."""
    resources = Resources(
        nodes=command.nodes,
        gpus_per_node=command.gpus_per_node,
        ranks_per_node=command.ranks_per_node,
        cpus_per_task=command.cpus_per_task,
        partition=command.partition,
        account=command.account,
        qos=command.qos,
        constraint=command.constraint,
        reservation=command.reservation,
        exclude=command.exclude,
        mem=command.mem,
        time=command.time,
        signal_seconds=command.signal_seconds,
    )
    name, run_dir = _run_of(command, overrides, max(1, resources.ranks))
    start_from = None if command.resume == AUTO else os.path.abspath(command.resume)
    if start_from is not None and not Path(start_from).is_dir():
        raise UserError(f"--resume: folder '{command.resume}' does not exist; expected {AUTO} or a checkpoint or run")
    in_file = command.container is not None and "://" not in command.container
    return Job(
        # SLURM's commands read a list where a name has a comma.
        name=f"{re.sub('[^A-Za-z0-9_.-]+', '-', name)}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:6]}",
        run_dir=run_dir,
        folder=Path.cwd(),
        python="python3" if command.container else sys.executable,
        config=Path(os.path.abspath(command.config)),
        arguments=(*(["--scale", command.scale] if command.scale else []), *overrides),
        resources=resources,
        setup=None if command.setup is None else Path(os.path.abspath(command.setup)),
        container=os.path.abspath(command.container) if in_file and command.container else command.container,
        start_from=start_from,
        check=command.check,
    )


def _run_of(command: Slurm, overrides: Sequence[str], ranks: int) -> tuple[str, Path]:
    """Name and absolute folder of the run, or of the pipeline of runs."""
    if is_pipeline(command.config):
        stages = load_pipeline(command.config, overrides, command.scale)
        if command.resume != AUTO:
            raise UserError(f"--resume: a pipeline goes on by itself; expected nothing, or {AUTO}")
        first = stages[0].load({})
        plan_batches(first, ranks)
        return Path(command.config).stem, Path(os.path.abspath(stages[0].run_dir.parent))
    config = load_config(command.config, overrides, command.scale)
    plan_batches(config, ranks)
    return config.name, Path(os.path.abspath(config.run_dir))
