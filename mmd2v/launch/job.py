"""What a SLURM job of a run asks for, and what is wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mmd2v.errors import UserError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_MEMORY = re.compile(r"[0-9]+[KMGT]?")
_UNLIMITED = ("unlimited", "infinite")
_LONGEST_NOTICE = 65535  # seconds: SLURM keeps the number in 16 bits


@dataclass(frozen=True)
class Resources:
    """What the job asks of the cluster; None leaves it to the cluster's own default."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int | None = None
    """Ranks on each node; None: one a GPU, or one where there are none."""
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    mem: str | None = None
    """Memory of each node, with SLURM's units: ``200G``."""
    time: str | None = None
    signal_seconds: int = 120
    """Notice before the time limit, at which every rank saves and the job is queued again."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Job:
    """A run as a job: everything its script says."""

    name: str
    run_dir: Path
    """Absolute; it holds the script and the log."""
    folder: Path
    """Absolute: where the job runs, so that relative paths of the config mean what they mean at submission."""
    python: str
    """The interpreter; inside a container, the name of the one it has."""
    config: Path
    arguments: tuple[str, ...]
    """What follows ``mmd2v train CONFIG --resume auto``."""
    resources: Resources
    setup: Path | None = None
    container: str | None = None
    start_from: str | None = None
    """Checkpoint to start from while the run has none of its own."""
    check: bool = True

    @property
    def script(self) -> Path:
        """Where the script is written."""
        return self.run_dir / "job.sbatch"

    @property
    def folders(self) -> list[Path]:
        """What the run reads and writes beside its data; a container has to see it."""
        start = [] if self.start_from is None else [Path(self.start_from)]
        return list(dict.fromkeys([self.folder, self.run_dir, self.config.parent, *start]))

    def log(self, number: str = "%j") -> Path:
        """The file the job writes to; ``%j`` stands for its number."""
        return self.run_dir / f"slurm-{number}.log"


def check_job(job: Job) -> None:
    """Raise UserError for what SLURM would refuse or, worse, read as something else."""
    resources = job.resources
    _at_least(1, {"--nodes": resources.nodes, "--signal-seconds": resources.signal_seconds})
    _at_least(0, {"--gpus-per-node": resources.gpus_per_node})
    _at_least(1, {"--cpus-per-task": resources.cpus_per_task, "--ranks-per-node": resources.ranks_per_node})
    if resources.gpus_per_node and resources.ranks_per_node not in (None, resources.gpus_per_node):
        raise UserError(
            f"--ranks-per-node: found {resources.ranks_per_node} beside --gpus-per-node {resources.gpus_per_node}; a "
            "rank has a GPU of its own, so leave it out (it is for nodes without: --gpus-per-node 0)"
        )
    if resources.signal_seconds > _LONGEST_NOTICE:
        raise UserError(f"--signal-seconds: found {resources.signal_seconds}; expected at most {_LONGEST_NOTICE}")
    limit = seconds_of(resources.time) if resources.time is not None else None
    if limit is not None and limit <= resources.signal_seconds:
        raise UserError(
            f"--time: {resources.time} is {limit} s, and --signal-seconds would end the run {resources.signal_seconds} "
            "s before; expected a longer time or a shorter notice"
        )
    for flag in ("partition", "account", "qos", "constraint", "reservation", "exclude"):
        _one_word(f"--{flag}", getattr(resources, flag))
    if resources.mem is not None and not _MEMORY.fullmatch(resources.mem):
        raise UserError(f"--mem: found '{resources.mem}'; expected a node's memory such as 200G (K, M, G or T; 0: all)")
    _check_texts(job)
    if job.setup is not None and not job.setup.is_file():
        raise UserError(f"--setup: {job.setup} is no file; expected a shell script to source before the run")
    if job.container is not None and "://" not in job.container and not Path(job.container).exists():
        raise UserError(f"--container: {job.container} does not exist; expected an image file or docker://NAME:TAG")


def _check_texts(job: Job) -> None:
    texts = {"run_dir": str(job.run_dir), "the present folder": str(job.folder), "CONFIG": str(job.config)}
    texts |= {"name": job.name, "--setup": str(job.setup or ""), "--container": job.container or ""}
    texts |= {"--resume": job.start_from or ""}
    for what, text in [*texts.items(), *(("the overrides", argument) for argument in job.arguments)]:
        if any(ord(character) < 32 or ord(character) == 127 for character in text):
            raise UserError(f"{what}: found a line break or another control character in {text!r}; expected none")
    for folder in job.folders if job.container is not None else ():
        if any(character in str(folder) for character in ",:"):
            raise UserError(f"--container: {folder} has a comma or a colon, which a container's --bind cannot name")
    if "\\" in str(job.run_dir):
        raise UserError(f"run_dir: found a backslash in {job.run_dir}, with which SLURM fills in no job number")


def _at_least(least: int, values: dict[str, int | None]) -> None:
    for flag, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{flag}: found {value}; expected at least {least}")


def _one_word(flag: str, value: str | None) -> None:
    if value is not None and (not value or not value.isprintable() or " " in value):
        raise UserError(f"{flag}: found {value!r}; expected one word")


def seconds_of(text: str) -> int | None:
    """Return the seconds of a time limit as SLURM reads it: ``90`` is minutes; None for ``UNLIMITED``.

    Raises UserError for anything else than minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes and days-hours:minutes:seconds.
    """
    if text.lower() in _UNLIMITED:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time: found '{text}'; expected minutes or [days-]hours:minutes:seconds")
    given = [int(match[name]) for name in ("first", "second", "third") if match[name] is not None]
    if match["days"] is not None:
        hours, minutes, seconds = (*given, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = {1: (0, *given, 0), 2: (0, *given), 3: given}[len(given)]
    return hours * 3600 + minutes * 60 + seconds
