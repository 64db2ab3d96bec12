"""The meeting point of ranks that mpirun started: rank 0 picks it, MPI carries it to the others."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

from mmd2v.distributed.launchers import ADDRESS, PORT, Place
from mmd2v.errors import UserError, told_once_a_node


def needs_meeting(place: Place) -> bool:
    """Whether the launcher left something open that the ranks have to agree on."""
    return place.size > 1 and None in (place.address, place.port, place.local_rank)


def meet_by_mpi(place: Place) -> Place:
    """Return ``place`` with address, port and place on the node; every rank must call it.

    What the environment gives is kept. Raises UserError without mpi4py, or with one that was built for another MPI.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except ImportError as error:
        unknown = "which of the ranks of a node this is" if place.local_rank is None else "where the ranks meet"
        instead = "set LOCAL_RANK and LOCAL_WORLD_SIZE" if place.local_rank is None else f"set {ADDRESS} and {PORT}"
        raise told_once_a_node(
            UserError(
                f"{place.launcher} started {place.size} ranks, but does not say {unknown}: install mpi4py "
                f"(pip install 'mmd2v[mpi]'), or {instead} ({error})"
            )
        ) from None
    own = not MPI.Is_initialized()
    if own:
        MPI.Init()
    everyone = MPI.COMM_WORLD
    if everyone.Get_size() != place.size:
        raise UserError(
            f"{place.launcher} started {place.size} ranks, but mpi4py finds {everyone.Get_size()}: it was built for "
            f"another MPI; build it with this one's mpicc, or set {ADDRESS} and {PORT}"
        )
    met = _agree(place, everyone, MPI)
    if own:
        # The ranks talk through torch from here on; MPI's own threads do not survive the loader's fork.
        MPI.Finalize()
    return met


def _agree(place: Place, everyone: Any, mpi: Any) -> Place:
    here = everyone.Split_type(mpi.COMM_TYPE_SHARED)
    place = replace(place, local_rank=here.Get_rank(), local_size=here.Get_size())
    proposal = None
    if everyone.Get_rank() == 0:
        address = "127.0.0.1" if place.local_size == place.size else address_of_this_node()
        proposal = (address, free_port())
    address, port = everyone.bcast(proposal, root=0)
    here.Free()
    return replace(place, address=place.address or address, port=place.port if place.port is not None else port)


def address_of_this_node() -> str:
    """The address from which this node reaches others; its name where it has no route to anywhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
