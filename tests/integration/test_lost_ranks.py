"""Two real ranks of which one is killed, stopped, stalls or fails alone: the other names it and ends, promptly.

The ranks are forked from one process that has imported torch, which is what most of the time would go to.
"""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from waiting import LONG, free_port, wait_until

from mmd2v.data.watch import Watchdog
from mmd2v.distributed import environment, verdict
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.distributed.processes import LOST_STATUS
from mmd2v.errors import UserError

PROMPT = 120.0  # seconds, where a few are enough; the collective that the other rank is in would wait for hours


def rank_process(scenario, rank, port, out, hurry):
    """What a rank runs: some steps together; then rank 1 is late with its data, and rank 0 waits for it."""
    with open(out, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    world = environment.initialize("cpu")
    try:
        with Pulse(world, LONG) as pulse:
            if pulse._watch is not None:
                type(pulse._watch)._timeout = property(lambda watch: seconds_in(hurry))
            pulse.newest = lambda: Path("runs/a/step-3")
            for step in range(4):
                pulse.at(step, "computing")
                dist.all_reduce(torch.ones(1))
            SCENARIOS[scenario](rank, pulse)
    except UserError as error:
        if scenario == "raises_and_stays":
            threading.Event().wait(LONG)
        print(f"own error: {error}")
        raise SystemExit(2) from None
    environment.shutdown()


def seconds_in(file):
    """Seconds without a word after which a rank counts as frozen: what the test has written there by now. Until then
    there are many, so that a rank that is only slow does not.
    """
    try:
        return float(Path(file).read_text())
    except (OSError, ValueError):
        return LONG


def wait_for_end(rank, pulse):
    """Say READY when the other rank is known to be where it is, which takes a beat; then wait."""
    phases = ("computing", "waiting for data")
    pulse.at(4, phases[rank])
    threading.Thread(target=_say_ready, args=(pulse, 1 - rank, phases[1 - rank]), daemon=True).start()
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    threading.Event().wait(LONG)


def _say_ready(pulse, other, phase):
    while (known := pulse._watch._states[other]).step != 4 or known.phase != phase:
        time.sleep(0.05)
    print("READY")


def fork_and_wait(rank, pulse):
    """A loader process must not hold its dead parent's connection."""
    if rank == 1:
        multiprocessing.get_context("fork").Process(target=_outlive, daemon=True).start()
    wait_for_end(rank, pulse)


def _outlive():
    enough, deadline = _enough(os.readlink("/proc/self/fd/1")), time.monotonic() + LONG
    while not enough.exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def _enough(output):
    """The file with which the test says that a process with this output may end."""
    return Path(f"{output}.enough")


def raise_alone(rank, pulse):
    verdict.ERROR_GRACE = 2.0
    pulse.at(4, ("computing", "saving")[rank])
    if rank == 1:
        raise UserError("the disk is full\nmore of it")
    dist.all_reduce(torch.ones(1))


def raise_together(rank, pulse):
    verdict.ERROR_GRACE = LONG
    if rank == 1:
        time.sleep(0.5)
    raise UserError("the same")


def stall(rank, pulse):
    if rank == 0:
        pulse.at(4, "computing")
        dist.all_reduce(torch.ones(1))
    pulse.at(4, "waiting for data")
    with Watchdog(60, lambda: "shard 7", end_after=1) as watchdog:
        watchdog.expect()
        threading.Event().wait(LONG)


def finish(rank, pulse):
    """Strangers talk, the clock jumps, a rank finishes later than the other: nothing happens."""
    if rank == 1:
        for said in (b'{"kind": "end", "text": "no"}\n', b"GET / HTTP/1.0\n\n", b'{"kind": "hello", "rank": 1}\n'):
            with socket.create_connection(("127.0.0.1", pulse._watch._meeting.port), timeout=30) as stranger:
                stranger.sendall(said)
                assert stranger.recv(100) == b""  # it is sent away
    now = itertools.cycle([0.0, 4e9])
    time.time = lambda: next(now)
    for step in range(20):
        pulse.at(step, "computing")
        dist.all_reduce(torch.ones(1))
        time.sleep(0.05)
    if rank == 1:
        time.sleep(1.5)


def step_until_told(rank, pulse):
    goes_on = torch.ones(1)
    while goes_on:
        pulse.at(4, "computing")
        if rank == 0 and _enough(os.readlink("/proc/self/fd/1")).exists():
            goes_on.zero_()
        dist.broadcast(goes_on, 0)
        if pulse._watch._states[1 - rank].step == 4:
            print("READY")
        time.sleep(0.1)


SCENARIOS = {
    "waits": wait_for_end,
    "forks": fork_and_wait,
    "raises": raise_alone,
    "raises_and_stays": raise_alone,
    "raise_together": raise_together,
    "stalls": stall,
    "finishes": finish,
    "steps": step_until_told,
}


@dataclass
class Job:
    """Two running ranks."""

    processes: list
    outputs: list[Path]
    hurry: Path

    def told(self, rank):
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def until_ready(self):
        wait_until(lambda: all("READY" in self.told(rank) for rank in (0, 1)), lambda: [self.told(0), self.told(1)])

    def status(self, rank, within=LONG):
        self.processes[rank].join(within)
        return self.processes[rank].exitcode

    def name(self, rank):
        return f"rank {rank} (host {socket.gethostname()}, pid {self.processes[rank].pid})"


@pytest.fixture(scope="module")
def context():
    chosen = multiprocessing.get_context("forkserver")
    # By names that are found without this process's sys.path, which Python 3.11 does not hand over.
    chosen.set_forkserver_preload(["mmd2v.data.watch", "mmd2v.distributed.heartbeat", "pytest"])
    return chosen


@pytest.fixture
def start(context, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = []

    def begin(scenario):
        port, hurry = free_port(), tmp_path / "hurry"
        outputs = [tmp_path / f"rank{rank}" for rank in (0, 1)]
        processes = [
            context.Process(target=rank_process, args=(scenario, rank, port, str(outputs[rank]), str(hurry)))
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        jobs.append(Job(processes, outputs, hurry))
        return jobs[0]

    yield begin
    for job in jobs:
        for process, output in zip(job.processes, job.outputs, strict=True):
            process.kill()
            process.join()
            _enough(output).touch()


CONTINUE = "; the newest checkpoint is runs/a/step-3; continue with --resume auto\n"


@pytest.mark.parametrize(("lost", "scenario"), [(1, "forks"), (0, "waits")])
def test_a_killed_rank_is_named_by_the_other(start, lost, scenario):
    job = start(scenario)
    job.until_ready()
    os.kill(job.processes[lost].pid, signal.SIGKILL)
    assert job.status(1 - lost, PROMPT) == LOST_STATUS
    assert job.status(lost, PROMPT) == -signal.SIGKILL
    told = job.told(1 - lost)
    phase = ("computing", "waiting for data")[lost]
    assert f"error: {job.name(lost)} died at step 4 while {phase} (for " in told and told.endswith(CONTINUE)
    assert "Traceback" not in told


@pytest.mark.parametrize("lost", [1, 0])
def test_a_stopped_rank_is_named_and_ends_when_it_goes_on(start, lost):
    job = start("waits")
    job.until_ready()
    os.kill(job.processes[lost].pid, signal.SIGSTOP)
    job.hurry.write_text("5")
    assert job.status(1 - lost, PROMPT) == LOST_STATUS
    told = job.told(1 - lost)
    phase = ("computing", "waiting for data")[lost]
    assert f"error: {job.name(lost)} is frozen at step 4 while {phase} (for " in told and told.endswith(CONTINUE)
    assert job.processes[lost].exitcode is None
    os.kill(job.processes[lost].pid, signal.SIGCONT)
    assert job.status(lost, PROMPT) == LOST_STATUS


@pytest.mark.parametrize("scenario", ["raises", "raises_and_stays"])
def test_a_rank_that_fails_alone_ends_the_other_with_its_error(start, scenario):
    job = start(scenario)
    assert job.status(0) == LOST_STATUS
    error = f"error: {job.name(1)} ended with an error at step 4 while saving: UserError: the disk is full{CONTINUE}"
    assert job.told(0).endswith(error)
    assert "Traceback" not in job.told(0)
    if scenario == "raises":
        assert job.status(1, PROMPT) == 2
        assert "own error: the disk is full" in job.told(1)


def test_ranks_that_fail_together_tell_their_own_error(start):
    job = start("raise_together")
    assert [job.status(rank) for rank in (0, 1)] == [2, 2]
    assert job.told(0) == job.told(1) == "own error: the same\n"


def test_a_loader_that_stalls_in_the_training_process_ends_both(start):
    job = start("stalls")
    assert [job.status(rank) for rank in (0, 1)] == [LOST_STATUS] * 2
    reason = "data.stall_timeout: no batch in that time; waited for shard 7"
    assert job.told(1).endswith(f"error: {reason}\n")
    assert f"error: {job.name(1)} ended with an error at step 4 while waiting for data: {reason}" in job.told(0)


def test_strangers_clocks_and_a_late_finish_disturb_nobody(start):
    job = start("finishes")
    assert [job.status(rank) for rank in (0, 1)] == [0, 0], [job.told(0), job.told(1)]
    assert job.told(0) == job.told(1) == ""


def test_a_job_that_is_suspended_as_a_whole_goes_on(start):
    job = start("steps")
    job.until_ready()
    for process in job.processes:
        os.kill(process.pid, signal.SIGSTOP)
    before = [job.told(rank).count("READY") for rank in (0, 1)]
    job.hurry.write_text("10")
    time.sleep(13)
    for process in job.processes:
        os.kill(process.pid, signal.SIGCONT)
    # So many steps take two seconds, in which who watches has looked.
    wait_until(
        lambda: all(
            job.told(rank).count("READY") > before[rank] + 20 or not job.processes[rank].is_alive() for rank in (0, 1)
        )
    )
    job.hurry.unlink()
    _enough(job.outputs[0]).touch()
    assert [job.status(rank) for rank in (0, 1)] == [0, 0], [job.told(0), job.told(1)]
    assert "error" not in job.told(0) + job.told(1)
