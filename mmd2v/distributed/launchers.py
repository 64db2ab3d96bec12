"""Who this process is, as its launcher tells it: torchrun, deepspeed, mpirun (OpenMPI, MPICH, Intel, MVAPICH) or srun.

Nothing here changes the environment or talks to another process; `environment` and `mpi_meeting` do.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mmd2v.distributed.hostlist import counts, hosts
from mmd2v.errors import UserError

ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"

# Below the range from which systems hand out ports by themselves (32768 on Linux).
_FIRST_PORT, _PORTS = 20_000, 12_000

# Launchers of MPI, each with its variables: rank, size, local rank, local size. MPICH's and Intel's share theirs.
_MPI = {
    "OpenMPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class Place:
    """This process among those that were started together.

    ``address`` and ``port`` are where rank 0 waits for the others; None where the launcher says nothing of them. So is
    the place on the node with some launchers of MPI.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    address: str | None = None
    port: int | None = None

    def variables(self) -> dict[str, str]:
        """The variables of torchrun that say the same, for DeepSpeed and everything else that reads them."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            ADDRESS: self.address,
            PORT: self.port,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


ALONE = Place("none", 0, 1, 0, 1, "127.0.0.1", 0)


def find_place(environ: Mapping[str, str], resolves: Callable[[str], bool] | None = None) -> Place:
    """Return this process's place; `ALONE` when nothing launched it together with others.

    torchrun's and deepspeed's variables count before those of MPI, and these before srun's: the former are started by
    the latter. MASTER_ADDR and MASTER_PORT count before what a launcher says of them. ``resolves`` tells whether a
    host's name is known on this node. Raises UserError for variables that are incomplete, no numbers, or contradict
    each other.
    """
    outer = [place for place in (_mpi(environ), _srun(environ, resolves or _resolves)) if place is not None]
    inner = _torch(environ, outer)
    place = inner or next(iter(outer), ALONE)
    _check(place)
    if place.size == 1:
        # Another launcher's address may be in the environment, and is of no use to a process alone.
        return replace(ALONE, launcher=place.launcher)
    return _with_users_meeting_point(place, environ)


def _torch(environ: Mapping[str, str], outer: list[Place]) -> Place | None:
    """The place that torchrun, deepspeed or a person gives; an outer launcher that agrees says what is missing."""
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", ADDRESS, PORT)
    present = [name for name in known if environ.get(name)]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return None
    rank, size = _optional(environ, "RANK"), _optional(environ, "WORLD_SIZE")
    for place in outer:
        if rank in (None, place.rank) and size in (None, place.size):
            return replace(place, **_given_local(environ))
        # torchrun may well run on its own in every task of a step; anything else started every task as the same rank.
        if size is not None and size < place.size and "TORCHELASTIC_RUN_ID" not in environ:
            raise UserError(
                f"environment: found RANK={rank}, WORLD_SIZE={size}, but {place.launcher} started {place.size} "
                f"processes and says this one is rank {place.rank}; unset RANK and WORLD_SIZE"
            )
    if missing := sorted(set(known) - set(present)):
        raise UserError(
            f"environment: {', '.join(present)} set, but {', '.join(missing)} missing; use a launcher or unset"
        )
    assert rank is not None and size is not None
    local = {"local_rank": None, "local_size": None, **_given_local(environ)}
    return Place("RANK and WORLD_SIZE", rank, size, **local)


def _given_local(environ: Mapping[str, str]) -> dict[str, int]:
    """The place on the node, as far as the environment gives it; deepspeed says LOCAL_SIZE for torchrun's name."""
    local_size = _optional(environ, "LOCAL_WORLD_SIZE")
    given = {
        "local_rank": _optional(environ, "LOCAL_RANK"),
        "local_size": _optional(environ, "LOCAL_SIZE") if local_size is None else local_size,
    }
    return {field: value for field, value in given.items() if value is not None}


def _mpi(environ: Mapping[str, str]) -> Place | None:
    for launcher, (rank, size, local_rank, local_size) in _MPI.items():
        if environ.get(rank) and environ.get(size):
            place = Place(
                launcher,
                _integer(environ, rank),
                _integer(environ, size),
                _optional(environ, local_rank),
                _optional(environ, local_size),
            )
            # srun --mpi=pmi2 sets PMI's variables as well, and knows more.
            return None if _is_srun_itself(place, environ) else place
    return None


def _is_srun_itself(place: Place, environ: Mapping[str, str]) -> bool:
    return place.local_rank is None and (
        environ.get("SLURM_PROCID") == str(place.rank) and environ.get("SLURM_STEP_NUM_TASKS") == str(place.size)
    )


def _srun(environ: Mapping[str, str], resolves: Callable[[str], bool]) -> Place | None:
    # srun alone sets this one: a batch script has SLURM_PROCID=0 and SLURM_NTASKS too, and is one process.
    if not environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if not environ.get(name)]
    if missing:
        raise UserError(f"environment: SLURM_STEP_NUM_TASKS set, but {', '.join(missing)} missing; start it with srun")
    rank, local_rank = (_integer(environ, name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    if size == 1:
        return Place("srun", rank, size, local_rank, 1)
    return Place(
        "srun", rank, size, local_rank, _tasks_here(environ), _first_host(environ, resolves), _port_of_step(environ)
    )


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node: ``SLURM_STEP_TASKS_PER_NODE`` is ``4(x2),3`` for three nodes."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if not text:
        return None
    try:
        per_node = counts(text)
    except ValueError as error:
        raise UserError(f"environment variable SLURM_STEP_TASKS_PER_NODE: {error}; expected such as 4(x2),3") from None
    node = _optional(environ, "SLURM_NODEID") or 0
    if node >= len(per_node):
        raise UserError(f"environment: SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE={text} has fewer nodes")
    return per_node[node]


def _first_host(environ: Mapping[str, str], resolves: Callable[[str], bool]) -> str | None:
    """The node of rank 0, if its name is known here, else the address from which srun was called."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    try:
        first = next(hosts(nodes)) if nodes else ""
    except ValueError as error:
        raise UserError(f"environment variable SLURM_STEP_NODELIST: {error}; expected such as a[001-004,7],b") from None
    return first if first and resolves(first) else environ.get("SLURM_LAUNCH_NODE_IPADDR") or None


def _port_of_step(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a step find alone, and other steps and a job that was queued again do not share."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    step = ".".join(environ.get(name, "0") for name in names)
    return _FIRST_PORT + zlib.crc32(step.encode()) % _PORTS


def _with_users_meeting_point(place: Place, environ: Mapping[str, str]) -> Place:
    if environ.get(ADDRESS):
        place = replace(place, address=environ[ADDRESS])
    port = _optional(environ, PORT)
    return place if port is None else replace(place, port=port)


def _check(place: Place) -> None:
    """Raise UserError for a rank beyond the size, in all or on the node."""
    sizes = [("rank", place.rank, place.size), ("local rank", place.local_rank, place.local_size)]
    for what, index, size in sizes:
        if index is not None and size is not None and index >= size:
            raise UserError(f"environment: {place.launcher} gives {what} {index} of {size}; expected 0 to {size - 1}")
    if place.local_size is not None and place.local_size > place.size:
        raise UserError(
            f"environment: {place.launcher} gives {place.local_size} ranks on this node, but {place.size} in all"
        )


def _optional(environ: Mapping[str, str], name: str) -> int | None:
    return _integer(environ, name) if environ.get(name) else None


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"environment variable {name}: found '{text}'; expected a whole number")
    return int(text)


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def announce() -> None:
    """Write rank and size into the environment as torchrun does, so that messages before the ranks meet come once.

    Says nothing of wrong variables: `environment.initialize` does, and not every command needs them.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    try:
        place = find_place(os.environ, lambda host: False)
    except UserError:
        return
    if place.size > 1:
        here = replace(place, address=None, port=None)
        os.environ.update(here.variables())
