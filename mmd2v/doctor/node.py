"""The check of all nodes of a job: every rank looks at its own, they try the ways between them, rank 0 tells."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmd2v.distributed.launchers import find_place
from mmd2v.distributed.mpi_meeting import meet_by_mpi, needs_meeting
from mmd2v.doctor import comparing, devices, links, sharing
from mmd2v.doctor.alone import SECONDS, node_checks
from mmd2v.doctor.finding import Finding, Named, Subject, TooSlow, ask_all, within
from mmd2v.doctor.meeting import Apart, Meeting, call_roll
from mmd2v.doctor.software import versions
from mmd2v.doctor.table import Node, Outcome, by_node, render
from mmd2v.files import write_json

REPORT_SECONDS = 4 * links.SECONDS
"""After which rank 0, which is done then, gives up on a rank: links may be lost to it one after another."""

_SHARED, _CLOCK, _ALIKE, _RANKS = "shared folder", "clock", "software", "ranks"
_LINKS = {"gloo": "link", "nccl": "NCCL link"}


@dataclass
class Report:
    """What one rank tells rank 0."""

    found: list[Named]
    links: list[links.Link]
    versions: dict[str, str]
    models: list[str] | None  # None from all but the first rank of a node


def examine_nodes(
    subject: Subject, *, ranks: int | None = None, timeout: float = 120.0, json: Path | None = None
) -> int:
    """Check every node of the job that started this process; return the exit status, the same on every rank.

    ``ranks``: how many should come, None for what the launcher says; ``timeout``: seconds in which they must. Rank 0
    prints the outcome and writes it to ``json``. Raises UserError for a launcher's variables that are wrong.
    """
    place = find_place(os.environ)
    if needs_meeting(place):
        place = meet_by_mpi(place)
    os.environ.update(place.variables())
    # A message that is lost must come back as an error here, not end the process from another thread.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    subject = replace(subject, ranks=place.local_size or 1)
    try:
        meeting = Meeting(place, timeout)
    except Apart as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    fit = False
    try:
        names = call_roll(meeting, timeout, os.environ)
        fit = _examine(meeting, subject, names, ranks, json)
    except Apart as error:
        if place.rank == 0 or error.everywhere:
            print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        fit = meeting.part(fit)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if fit else 1


def _examine(meeting: Meeting, subject: Subject, names: list[str], ranks: int | None, json: Path | None) -> bool:
    """Ask, compare and tell; what rank 0 returns counts."""
    labels = [f"{name} (rank {rank})" for rank, name in enumerate(names)]
    with sharing.marker(subject.run_dir if meeting.place.rank == 0 else None) as placed:
        wanted = meeting.gather("marker", placed, SECONDS)[0]
        own = _own(meeting, subject, labels, wanted)
        reports = meeting.gather("report", asdict(own), REPORT_SECONDS)
    if meeting.place.rank:
        return False
    said = _judged(meeting, reports, labels)
    said[0].append(Named(_RANKS, comparing.count_of_ranks(meeting.place.size, ranks)))
    if subject.run_dir is None and len(set(names)) > 1:
        hint = "name the run's folder with --config or --run-dir"
        said[0].append(Named(_SHARED, Finding("warning", "not checked whether all nodes see it", hint)))
    return _tell(by_node(names, said), json)


def _own(meeting: Meeting, subject: Subject, labels: list[str], wanted: list[str] | None) -> Report:
    """Everything this rank finds out."""
    place = meeting.place
    first_here = not place.local_rank  # one rank a node looks at what all of its ranks share
    found: list[Named] = []
    if place.size > 1:
        meeting.at("looking at the run folder")
        found.append(Named(_SHARED, _shared(subject.run_dir, wanted, labels[0])))
    if first_here:
        meeting.at("looking at its own node")
        found += ask_all(node_checks(), subject, SECONDS)
    seen = devices.models() if subject.device != "cpu" else []
    ring = _between(meeting, found, len(seen)) if place.size > 1 else []
    meeting.at("reporting")
    return Report(found, ring, versions(), seen if first_here else None)


def _shared(run_dir: Path | None, wanted: list[str] | None, first: str) -> Finding:
    try:
        return within(SECONDS, lambda: sharing.look_for(run_dir, wanted, first))
    except TooSlow as error:
        return Finding("error", f"{run_dir}: {error}", "look at the file system's server", "no answer")


def _between(meeting: Meeting, found: list[Named], gpus: int) -> list[links.Link]:
    """Try the clocks and links of a group of ranks, and NCCL's where every rank has a GPU of its own."""
    place, size = meeting.place, meeting.place.size
    meeting.at("connecting to the other ranks by gloo")
    error = links.form_group(meeting)
    local = place.local_rank or 0
    mine = local if local < gpus else None
    told = meeting.gather("group", [error, mine], SECONDS + 2 * links.SECONDS)
    errors = [None if answer is None else answer[0] for answer in told]
    if any(answer is None or answer for answer in errors):
        meeting.at("reaching the next rank by a socket")
        reached = links.reach_next(meeting)
        if reached:
            return [links.Link("gloo", place.rank, (place.rank + 1) % size, reached)]
        if links.at_fault(errors, place.rank):
            hint = "see that the node's name stands for an address others reach, or set GLOO_SOCKET_IFNAME"
            found.append(Named(_LINKS["gloo"], Finding("error", f"no group by gloo: {error}", hint, "fails")))
        return []
    meeting.at("comparing clocks")
    if place.rank == 0:
        links.serve_clock(meeting)
        found.append(Named(_CLOCK, Finding("ok", "the others are compared with it", short="—")))
    else:
        found.append(Named(_CLOCK, links.clock_offset(meeting)))
    meeting.gather("clocks", "", 2 * links.SECONDS)  # so that all come to the links together
    meeting.at("trying its links by gloo")
    ring = links.measure_ring(meeting, "gloo", torch.device("cpu"))
    if all(answer[1] is not None for answer in told) and not meeting.lost:
        meeting.at("trying its links by NCCL")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
        ring += links.measure_ring(meeting, "nccl", device, group)
    return ring


def _judged(meeting: Meeting, reports: Sequence[dict[str, Any] | None], labels: list[str]) -> list[list[Named]]:
    """Return all that is to be said of every rank, by what they report and how they compare."""
    said: list[list[Named]] = []
    for rank, report in enumerate(reports):
        if report is None:
            said.append([Named("report", comparing.silent(meeting.phase(rank)))])
        else:
            said.append([Named(check, Finding(**finding)) for check, finding in report["found"]])
    heard = [rank for rank, report in enumerate(reports) if report is not None]
    for at, finding in comparing.compare_versions([reports[rank]["versions"] for rank in heard]).items():
        said[heard[at]].append(Named(_ALIKE, finding))
    first_ranks = [rank for rank in heard if reports[rank]["models"] is not None]
    for at, finding in comparing.compare_gpus([reports[rank]["models"] for rank in first_ranks]).items():
        said[first_ranks[at]].append(Named("GPUs", finding))
    ring = [links.Link(**link) for rank in heard for link in reports[rank]["links"]]
    ring = [link for link in ring if {link.sender, link.receiver} <= set(heard)]  # a silent rank is told as such
    for backend, check in _LINKS.items():
        judged = links.judge_links([link for link in ring if link.backend == backend], labels)
        for rank, findings in judged.items():
            said[rank] += [Named(check, finding) for finding in findings]
    return said


def _tell(nodes: list[Node], json: Path | None) -> bool:
    outcome = Outcome(nodes)
    print(render(outcome), flush=True)
    if json is not None:
        write_json(json, outcome.as_dict())
    return outcome.fit
