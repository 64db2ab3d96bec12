"""The ranks of a check call the roll, and tell each other what they found, through one small store.

The store is all that must work: a node whose links are broken can still say so, and one that is missing is named.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mmd2v.distributed.hostlist import hosts
from mmd2v.distributed.launchers import Place

_LOOK_EVERY = 0.05  # seconds between two looks of rank 0 for what is missing
_MARGIN = 20.0  # seconds that others wait longer for rank 0 than rank 0 for them
_FAREWELL = 10.0


class Apart(Exception):
    """The ranks do not come together; the message says who is missing.

    ``everywhere``: rank 0 may not be there to tell it, so that every rank does.
    """

    def __init__(self, message: str, *, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def node_name(environ: Mapping[str, str]) -> str:
    """This node's name, SLURM's own if it has one."""
    return environ.get("SLURMD_NODENAME") or platform.node()


class Meeting:
    """The place where all ranks of a check leave what they have to say."""

    def __init__(self, place: Place, seconds: float, store: dist.Store | None = None) -> None:
        """Open the store on rank 0, or reach it there; `Apart` when that does not succeed in ``seconds``.

        ``store`` takes the place of one over the network.
        """
        self.place = place
        self.lost: set[int] = set()
        """Ranks that did not come to a gathering: nobody waits for them again."""
        if store is None:
            store = dist.HashStore() if place.size == 1 else _open(place, seconds)
        # torchrun keeps one store for all its attempts: what an earlier one has said does not count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"doctor/{attempt}", store)

    def gather(self, name: str, value: Any, seconds: float) -> list[Any]:
        """Return every rank's ``value`` (JSON) in rank order, None for those that do not come in ``seconds``.

        Every rank gets the same list. Raises Apart on the others when rank 0 says nothing.
        """
        self.store.set(f"{name}/{self.place.rank}", json.dumps([value]))
        if self.place.rank:
            boxes = json.loads(self.wait(f"{name}/all", seconds + _MARGIN))
        else:
            boxes = self._collect(name, seconds)
            self.store.set(f"{name}/all", json.dumps(boxes))
        self.lost |= {rank for rank, box in enumerate(boxes) if box is None}
        return [None if box is None else box[0] for box in boxes]

    def _collect(self, name: str, seconds: float) -> list[list[Any] | None]:
        """Return what every rank has left, each in a list of its own; None for those of which there is nothing."""
        deadline = time.monotonic() + seconds
        missing = [rank for rank in range(self.place.size) if rank not in self.lost]
        while missing := [rank for rank in missing if not self.store.check([f"{name}/{rank}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_EVERY)
        absent = self.lost.union(missing)
        return [
            None if rank in absent else json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.place.size)
        ]

    def wait(self, key: str, seconds: float) -> str:
        """Return what somebody sets ``key`` to; raise Apart after ``seconds``."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return self.store.get(key).decode()
        except RuntimeError as error:  # torch's name for every error of a store
            raise Apart(f"nobody has said '{key}' within {seconds:.0f} s: {_first_line(error)}") from None

    def at(self, phase: str) -> None:
        """Note what this rank does now, for rank 0 to tell when nothing more is heard of it."""
        self.store.set(f"phase/{self.place.rank}", phase)

    def phase(self, rank: int) -> str:
        """What a rank said last."""
        return self.store.get(f"phase/{rank}").decode() if self.store.check([f"phase/{rank}"]) else "the roll-call"

    def part(self, fit: bool) -> bool:
        """End the meeting: return rank 0's ``fit`` on every rank.

        Rank 0 has told the outcome before: a launcher ends all ranks when one has exited. It waits a little for those
        that came, for the store goes with it.
        """
        if self.place.rank:
            try:
                fit = self.wait("told", _MARGIN) == "fit"
                self.store.set(f"left/{self.place.rank}", "")
            except (Apart, RuntimeError):  # rank 0 is gone
                return False
            return fit
        self.store.set("told", "fit" if fit else "not fit")
        others = [rank for rank in range(1, self.place.size) if self.store.check([f"roll/{rank}"])]
        deadline = time.monotonic() + _FAREWELL
        while time.monotonic() < deadline and not all(self.store.check([f"left/{rank}"]) for rank in others):
            time.sleep(_LOOK_EVERY)
        return fit


def call_roll(meeting: Meeting, seconds: float, environ: Mapping[str, str]) -> list[str]:
    """Return the node of every rank; raise Apart, naming who is missing, unless all come in ``seconds``."""
    names = meeting.gather("roll", node_name(environ), seconds)
    if None in names:
        raise Apart(missing_message(names, seconds, environ), everywhere=False)
    return names


def missing_message(names: Sequence[str | None], seconds: float, environ: Mapping[str, str]) -> str:
    """Say who is missing: by the list of SLURM's nodes where there is one, else by rank."""
    present = [name for name in names if name is not None]
    ranks = ", ".join(str(rank) for rank, name in enumerate(names) if name is None)
    try:
        expected = list(hosts(environ.get("SLURM_STEP_NODELIST") or ""))
    except ValueError:
        expected = []
    absent = [node for node in expected if node and node not in present]
    who = f"node(s) {', '.join(absent)} (rank(s) {ranks})" if absent else f"rank(s) {ranks}"
    came = ", ".join(dict.fromkeys(present))
    return (
        f"{who} did not come within {seconds:.0f} s; {len(present)} of {len(names)} ranks did ({came}); look at what "
        "the missing node says itself, and whether it reaches rank 0"
    )


def _open(place: Place, seconds: float) -> dist.Store:
    assert place.address is not None and place.port is not None  # the meeting of MPI has filled in what was open
    # torchrun's agent is the server of its own store, at the address and port it gives.
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            place.address, place.port, place.size, serves, timedelta(seconds=seconds), wait_for_workers=False
        )
    except RuntimeError as error:
        where = f"{place.address}:{place.port} (MASTER_ADDR, MASTER_PORT)"
        if serves:
            raise Apart(f"rank 0 cannot wait for the others at {where}: {_first_line(error)}") from None
        raise Apart(
            f"rank 0 did not answer at {where} within {seconds:.0f} s: it is missing, or node "
            f"{node_name(os.environ)} (rank {place.rank}) cannot reach it ({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
