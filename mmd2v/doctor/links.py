"""How the nodes reach each other: every link of a ring of ranks, and how far their clocks are apart."""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmd2v.distributed.mpi_meeting import address_of_this_node
from mmd2v.doctor.finding import Finding
from mmd2v.doctor.meeting import Apart, Meeting

SECONDS = 30.0
"""After which a message between two ranks counts as lost."""

_ROUNDS, _BLOCKS = 10, 3
_BYTES = {"gloo": 4 << 20, "nccl": 64 << 20}
_SLOW = {"gloo": 50e6, "nccl": 1e9}  # bytes a second
_SLOWER_THAN_OTHERS = 4  # times, in a ring of at least so many links
_CLOCK_WARNING, _CLOCK_ERROR = 1.0, 60.0  # seconds


@dataclass(frozen=True)
class Link:
    """What came of sending from one rank to the next: bytes a second and seconds for one way, or an error."""

    backend: str
    sender: int
    receiver: int
    error: str = ""
    rate: float = 0.0
    latency: float = 0.0


def form_group(meeting: Meeting) -> str:
    """Connect all ranks by gloo; return what went wrong."""
    place = meeting.place
    try:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", meeting.store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=SECONDS),
        )
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def at_fault(answers: Sequence[str | None], rank: int) -> bool:
    """Tell whether a rank's own error, of all that `form_group` gave, is no mere wait for others.

    ``answers``: the errors by rank, empty where there is none, None of a rank that is silent. Where everybody waited
    in vain and nobody is silent, there is no telling.
    """
    culprits = [i for i, answer in enumerate(answers) if answer is None or (answer and "timeout" not in answer.lower())]
    return bool(answers[rank]) and (rank in culprits or not culprits)


def reach_next(meeting: Meeting) -> str:
    """Connect to the next rank by a plain socket, for when gloo does not say which nodes fail; return the error."""
    place = meeting.place
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        addresses = meeting.gather("address", [address_of_this_node(), listener.getsockname()[1]], SECONDS)
        address = addresses[(place.rank + 1) % place.size]
        error = ""
        if address is None:  # it is silent, and told as such
            address = addresses[place.rank]
        try:
            socket.create_connection(tuple(address), timeout=SECONDS / 6).close()
        except OSError as problem:
            error = f"{address[0]}:{address[1]}: {problem}"
        meeting.gather("reached", error, SECONDS)  # nobody stops listening before all have tried
    return error


def measure_ring(meeting: Meeting, backend: str, device: torch.device, group: Any = None) -> list[Link]:
    """Send from every rank to the next; return what this rank, as sender, saw. Every rank must call it.

    No rank is in two links at once, so that a slow one slows no other.
    """
    size, rank = meeting.place.size, meeting.place.rank
    found = []
    for sender in _turns(size, rank):
        receiver = (sender + 1) % size
        if meeting.lost & {sender, receiver}:
            continue
        link = _attempt(meeting, backend, sender, receiver, device, group)
        if link is not None:
            found.append(link)
    return found


def _turns(size: int, rank: int) -> list[int]:
    """Senders of the links this rank is part of, in an order that keeps the links of one turn apart.

    First those of even senders, then of odd ones; an odd ring's last link shares a rank with the first and comes last.
    """
    return sorted({rank, (rank - 1) % size}, key=lambda sender: _turn(size, sender))


def _turn(size: int, sender: int) -> int:
    return 2 if size % 2 and sender == size - 1 else sender % 2


def _attempt(
    meeting: Meeting, backend: str, sender: int, receiver: int, device: torch.device, group: Any
) -> Link | None:
    own, other = (sender, receiver) if meeting.place.rank == sender else (receiver, sender)
    name = f"{backend}/{sender}"
    try:
        meeting.store.set(f"{name}/{own}", "")
        # The other may be held before by a broken link of its own: by waiting there as here, and then by the link.
        meeting.wait(f"{name}/{other}", SECONDS * (1 + 2 * _turn(meeting.place.size, sender)))
        block = _pattern(sender, backend, device)
        if own == receiver:
            _receive(block, sender, group)
            return None
        rate, latency = _send(block, receiver, group)
    except (RuntimeError, Apart) as error:  # the former is torch's name for every error of communication
        return Link(backend, sender, receiver, str(error).splitlines()[0]) if own == sender else None
    return Link(backend, sender, receiver, "" if rate else "arrives changed", rate, latency)


def _pattern(sender: int, backend: str, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sender)
    return torch.randint(0, 256, (_BYTES[backend],), dtype=torch.uint8, generator=generator).to(device)


def _send(block: torch.Tensor, receiver: int, group: Any) -> tuple[float, float]:
    """Return bytes a second and the seconds of one way; a rate of 0 when the receiver says that it is not the same."""
    token = torch.ones(1, device=block.device)

    def there_and_back(x: torch.Tensor) -> float:
        start = time.perf_counter()
        dist.send(x, receiver, group)
        dist.recv(token, receiver, group)
        right = token.item()  # waits for the device
        return time.perf_counter() - start if right else 0.0

    there_and_back(token)  # connects
    latency = min(there_and_back(token) for _ in range(_ROUNDS)) / 2
    times = [there_and_back(block) for _ in range(_BLOCKS)]
    return (block.numel() / min(times) if all(times) else 0.0), latency


def _receive(expected: torch.Tensor, sender: int, group: Any) -> None:
    token, block = torch.ones(1, device=expected.device), torch.empty_like(expected)
    for _ in range(_ROUNDS + 1):
        dist.recv(token, sender, group)
        dist.send(token, sender, group)
    for _ in range(_BLOCKS):
        dist.recv(block.zero_(), sender, group)
        dist.send(torch.equal(block, expected) * torch.ones_like(token), sender, group)


def judge_links(links: Sequence[Link], names: Sequence[str]) -> dict[int, list[Finding]]:
    """Return what is to be said of every rank as the sender of its links; ``names`` are the ranks' in messages."""
    usual = statistics.median(rates) if (rates := [link.rate for link in links if not link.error]) else 0.0
    blamed = suspects([link for link in links if link.error])
    found: dict[int, list[Finding]] = {}
    for link in links:
        route = f"{names[link.sender]} → {names[link.receiver]} by {link.backend}"
        speed = f"{link.rate / 1e6:,.0f} MB/s, {link.latency * 1e6:,.0f} µs"
        hint = "try other interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and look at firewall, switch and cable"
        if link.error:
            for rank in (link.sender, link.receiver):
                if rank in blamed:
                    found.setdefault(rank, []).append(Finding("error", f"{route}: {link.error}", hint, "fails"))
            continue
        slower = len(links) >= _SLOWER_THAN_OTHERS and link.rate * _SLOWER_THAN_OTHERS < usual
        if link.rate < _SLOW[link.backend] or slower:
            against = f"; the median of all links is {usual / 1e6:,.0f} MB/s" if slower else ""
            finding = Finding("warning", f"{route}: slow, {speed}{against}", hint, f"{link.rate / 1e6:,.0f} MB/s")
        else:
            finding = Finding("ok", f"{route}: {speed}", short=f"{link.rate / 1e6:,.0f} MB/s")
        found.setdefault(link.sender, []).append(finding)
    return found


def suspects(failed: Sequence[Link]) -> set[int]:
    """Ranks to blame for links that fail: those with two of them if there are any, else both ends of each."""
    ends = Counter(rank for link in failed for rank in (link.sender, link.receiver))
    inside = {
        rank for rank in ends if len({link.sender for link in failed if rank in (link.sender, link.receiver)}) > 1
    }
    alone = [link for link in failed if not inside & {link.sender, link.receiver}]
    return inside | {rank for link in alone for rank in (link.sender, link.receiver)}


def serve_clock(meeting: Meeting) -> None:
    """Rank 0's part of `clock_offset`: tell every other rank the time, one after another."""
    now = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, meeting.place.size):
        meeting.store.set(f"clock/{rank}", "")
        try:
            for _ in range(_ROUNDS):
                dist.recv(now, rank)
                dist.send(now.fill_(time.time()), rank)
        except RuntimeError:  # the other tells it
            continue


def clock_offset(meeting: Meeting) -> Finding:
    """Compare this rank's wall clock with rank 0's, which must be in `serve_clock` or come to it."""
    meeting.wait(f"clock/{meeting.place.rank}", 4 * SECONDS)
    remote = torch.zeros(1, dtype=torch.float64)

    def ask() -> float:
        dist.send(remote, 0)
        dist.recv(remote, 0)
        return remote.item()

    try:
        return clock_finding(*offset(ask, time.time))
    except RuntimeError as error:
        return Finding("error", f"rank 0 cannot be asked for the time: {str(error).splitlines()[0]}", short="fails")


def offset(ask: Callable[[], float], clock: Callable[[], float]) -> tuple[float, float]:
    """Return seconds by which ``clock`` is ahead of the one that is asked, and how wrong that may be.

    The answer was given at some time between question and answer: at its middle, plus or minus half. The quickest of
    several counts.
    """
    best = (0.0, float("inf"))
    for _ in range(_ROUNDS):
        start, steady = clock(), time.perf_counter()
        told = ask()
        took = time.perf_counter() - steady
        if took / 2 < best[1]:
            best = (start + took / 2 - told, took / 2)
    return best


def clock_finding(ahead: float, uncertain: float) -> Finding:
    """Judge a clock that is ``ahead`` seconds before rank 0's."""
    size = abs(ahead)
    shown = f"{size * 1e3:.1f} ms" if size < 1 else f"{size:,.1f} s"
    what = f"{shown} {'ahead of' if ahead >= 0 else 'behind'} rank 0's, ± {uncertain * 1e3:.1f} ms"
    hint = "start its time service (chronyd or systemd-timesyncd)"
    if size - uncertain > _CLOCK_ERROR:
        return Finding("error", what, hint, shown)
    return (
        Finding("warning", what, hint, shown) if size - uncertain > _CLOCK_WARNING else Finding("ok", what, "", shown)
    )
