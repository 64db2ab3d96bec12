"""Who this process is among the ranks of a run, and the process group they share.

Works alone and under the launchers that `launchers` knows.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from mmd2v.config.section import LONGEST_WAIT
from mmd2v.distributed.compile_caches import separate_caches
from mmd2v.distributed.launchers import find_place
from mmd2v.distributed.mpi_meeting import meet_by_mpi, needs_meeting
from mmd2v.errors import UserError, told_once_a_node

COLLECTIVE_TIMEOUT = timedelta(seconds=LONGEST_WAIT) + timedelta(minutes=30)
"""Two hours. The others wait in a collective while a rank is late, which should be named before that gives up."""


@dataclass(frozen=True)
class World:
    """The ranks of a run as this process sees them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and talks to the user."""
        return self.rank == 0


def choose_device(device: Literal["auto", "cpu", "cuda"]) -> str:
    """Return ``"cpu"`` or ``"cuda"`` and tell DeepSpeed, which reads ``DS_ACCELERATOR`` when it is first imported.

    Raises UserError when CUDA is asked for and absent, or ``DS_ACCELERATOR`` says otherwise.
    """
    announced = os.environ.get("DS_ACCELERATOR")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and announced != "cpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: found 'cuda', but torch sees no CUDA device here; expected 'cpu' or 'auto'")
    if announced not in (None, device):
        raise UserError(f"engine.device: is '{device}', but the variable DS_ACCELERATOR is '{announced}'; unset it")
    os.environ["DS_ACCELERATOR"] = device
    return device


def initialize(device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """Join the process group the environment describes (or form one alone) and return this process's place in it.

    gloo on the CPU, NCCL on CUDA. Call before anything imports deepspeed. What a launcher says of the ranks is written
    into the environment as torchrun's variables. Raises UserError when it is incomplete or contradicts itself, and when
    a node has fewer devices than ranks.
    """
    try:
        kind = choose_device(device)
    except UserError as error:
        raise told_once_a_node(error) from None
    # DeepSpeed calls it at every gather of weights, and torch says so every time; there is nothing to be done about it.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor", FutureWarning)
    place = find_place(os.environ)
    if needs_meeting(place):
        place = meet_by_mpi(place)
    os.environ.update(place.variables() | separate_caches(place, os.environ))
    rank, size, local_rank = place.rank, place.size, place.local_rank or 0

    backend = "nccl" if kind == "cuda" else "gloo"
    target = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank}: needs CUDA device {local_rank}, this node has {torch.cuda.device_count()}")
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        _join(backend, rank, size, target)
    if kind == "cpu":
        _share_cores()
    return World(rank, size, local_rank, target, backend)


def _join(backend: str, rank: int, size: int, target: torch.device) -> None:
    if size == 1:  # a store in memory: no port, so any number of runs fit on one machine
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        return
    bound = target if target.type == "cuda" else None
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT, device_id=bound)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"ranks cannot meet at {where} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}; another run may "
            f"use the port: give the launcher another with --master_port, or set MASTER_PORT"
        ) from error


def shutdown() -> None:
    """Leave the process group."""
    if not dist.is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        # It keeps groups of its own, with which a later run in this process could not begin.
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


def ranks_on_this_node() -> int:
    """Ranks of this node, as `initialize` has written them into the environment; 1 where the launcher says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _share_cores() -> None:
    """Give each rank of a node its share of the cores; all of them on all cores slow each other down."""
    ranks = ranks_on_this_node()
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(_cores_of_a_task(cores) or max(1, cores // ranks))


def _cores_of_a_task(cores: int) -> int | None:
    """What srun keeps for this rank alone, of the ``cores`` it may run on; None unless srun started every rank."""
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    started = os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("WORLD_SIZE")
    return min(cores, int(own)) if started and own.isdecimal() and int(own) > 0 else None
