"""When a rank counts as lost, what ranks believe of what they are told, and that nobody is left behind."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from waiting import LONG, wait_until

from mmd2v.config.data import DataConfig
from mmd2v.config.section import LONGEST_WAIT
from mmd2v.config.training import EngineConfig
from mmd2v.distributed.environment import COLLECTIVE_TIMEOUT, World
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.distributed.heartline import Line, Message, decode, encode, is_greeting
from mmd2v.distributed.leaving import is_torn
from mmd2v.distributed.processes import LOST_STATUS
from mmd2v.distributed.verdict import ERROR_GRACE, LOST_GRACE, Left, RankState, judge, standstill

NOW, TIMEOUT = 1000.0, 120.0


def state(rank, **change):
    """A rank that was heard of just now, in the fourth second of step 9."""
    well = RankState(rank, f"gpu{rank:02}", 4000 + rank, heard=NOW - 0.4, since=NOW - 4, step=9, phase="computing")
    return replace(well, **change)


def gone(rank, how, ago, **change):
    return state(rank, left=how, left_at=NOW - ago, **change)


def judged(*states):
    return judge(states, NOW, TIMEOUT)


def test_all_is_well():
    assert judged(state(0), state(1), state(2, heard=NOW - TIMEOUT / 2)) is None


def test_a_dead_rank_is_named_after_a_moment():
    assert judged(state(0), gone(3, Left.LOST, LOST_GRACE / 2)) is None
    told = judged(state(0), gone(3, Left.LOST, LOST_GRACE, heard=NOW - 0.7))
    assert told.startswith("rank 3 (host gpu03, pid 4003) died at step 9 while computing (for 4 s; no word for 0.7 s)")


def test_of_several_dead_the_first_is_named_and_the_others_are_counted():
    told = judged(state(0), gone(2, Left.LOST, 1), gone(3, Left.LOST, 1.5), gone(4, Left.LOST, 0.1))
    assert told.startswith("rank 3 (") and ", likewise ranks 2 (gpu02), 4 (gpu04): " in told


def test_a_silent_rank_is_frozen():
    assert judged(state(0), state(1, heard=NOW - TIMEOUT + 1)) is None
    told = judged(state(0), state(1, heard=NOW - TIMEOUT, phase="saving", since=NOW - 150))
    assert told.startswith(
        "rank 1 (host gpu01, pid 4001) is frozen at step 9 while saving (for 150 s; no word for 120 s): its process is"
    )


def test_a_host_that_is_gone_has_all_of_its_ranks_named():
    told = judged(state(0), *(state(rank, heard=NOW - TIMEOUT + rank / 10) for rank in (0, 1, 2)))
    assert told.startswith("rank 0 (") and "likewise ranks 1 (gpu01), 2 (gpu02)" in told


def test_ranks_that_have_finished_are_not_missed():
    assert judged(state(0), gone(1, Left.DONE, 900, heard=NOW - 900)) is None


def test_ranks_that_fail_together_are_left_to_tell_it_themselves():
    assert judged(*(gone(rank, Left.RAISED, ERROR_GRACE + 1, error="the disk is full") for rank in range(3))) is None


def test_a_rank_that_fails_alone_is_named_with_its_error():
    alone = gone(1, Left.RAISED, ERROR_GRACE - 1, error="ValueError: no")
    assert judged(state(0), alone) is None
    told = judged(state(0), replace(alone, left_at=NOW - ERROR_GRACE))
    assert told == "rank 1 (host gpu01, pid 4001) ended with an error at step 9 while computing: ValueError: no"


def test_a_torn_collective_shortens_the_wait_and_is_never_the_cause():
    torn = gone(0, Left.TORN, 3, error="RuntimeError: gloo")
    assert judged(torn, gone(1, Left.RAISED, LOST_GRACE / 2, error="x")) is None
    assert judged(torn, gone(1, Left.RAISED, 1, error="x")).startswith("rank 1 ")
    assert judged(torn, gone(1, Left.LOST, 1)).startswith("rank 1 (host gpu01, pid 4001) died")


def test_who_left_first_is_the_cause():
    told = judged(state(0), gone(1, Left.RAISED, 3, error="x"), gone(2, Left.LOST, 1))
    assert told.startswith("rank 1 (host gpu01, pid 4001) ended with an error")


def test_a_collective_that_is_torn_by_nobody_is_told_to_those_who_wait():
    torn = gone(1, Left.TORN, ERROR_GRACE, error="RuntimeError: gloo: no route to host")
    assert judged(torn) is None
    assert judged(state(0), torn).endswith(": RuntimeError: gloo: no route to host")


def test_a_standstill_names_who_is_elsewhere():
    late = state(1, phase="waiting for data", since=NOW - 70)
    others = [state(rank, since=NOW - 65) for rank in (0, 2)]
    assert standstill([*others, late], NOW, 66) is None
    told = standstill([*others, late], NOW, 60)
    assert told.startswith("no rank has got on for 65 s: rank 1 (host gpu01, pid 4001) waiting for data at step 9 for")
    assert standstill(others, NOW, 60) is None, "an evaluation may last"


def test_a_message_is_what_it_was():
    said = Message("bye", rank=3, step=7, phase="saving", seconds=1.5, how="raised", text='é\n"\0\udcff')
    assert decode(encode(said)) == said
    assert encode(said).count(b"\n") == 1
    assert len(decode(encode(Message("end", text="\0" * 5000))).text) == 1000


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b"\xff\xfe",
        b"[" * 8000,
        b"[]",
        b"{}",
        b'{"kind": "shout"}',
        b'{"kind": ["beat"]}',
        b'{"kind": "beat", "more": 1}',
        b'{"kind": "beat", "step": -1}',
        b'{"kind": "beat", "step": true}',
        b'{"kind": "beat", "step": 1.5}',
        b'{"kind": "beat", "step": "1"}',
        b'{"kind": "beat", "seconds": NaN}',
        b'{"kind": "beat", "seconds": 1e999}',
        b'{"kind": "beat", "step": 1' + b"0" * 30 + b"}",
        json.dumps({"kind": "end", "text": "x" * 1001}).encode(),
    ],
)
def test_garbage_is_no_message(line):
    with pytest.raises(ValueError):
        decode(line)


def test_only_ranks_of_the_job_are_greeted():
    hello = Message("hello", token="secret", rank=1)
    assert is_greeting(decode(encode(hello)), "secret", 2)
    for other in (replace(hello, token="guess"), replace(hello, token=""), replace(hello, token="\udcff")):
        assert not is_greeting(other, "secret", 2)
    assert not is_greeting(replace(hello, rank=2), "secret", 2)
    assert not is_greeting(replace(hello, kind="beat"), "secret", 2)


@pytest.mark.parametrize("said", [b"x" * 10_000, b"x" * 9000 + b"\n", b"{}\n", b'{"kind": "beat"}'])
def test_a_line_ends_at_garbage_and_at_the_end(said):
    ours, theirs = socket.socketpair()
    with theirs:
        line = Line(ours)
        assert line.receive() == [] and line.open, "silence is no end"
        theirs.sendall(encode(Message("beat", step=4)) + said)
        theirs.shutdown(socket.SHUT_WR)
        messages = line.receive()
        assert len(messages) <= 1 and not line.open
        line.close()


def test_a_peer_that_does_not_read_costs_no_memory_and_no_time():
    ours, theirs = socket.socketpair()
    with theirs:
        line = Line(ours)
        for _ in range(20_000):
            line.send(Message("beat", phase="x" * 900))
        assert len(line._unsent) < 1 << 18
        line.close()


def test_errors_of_collectives_are_told_from_others():
    assert is_torn(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"))
    assert not is_torn(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_torn(ValueError("nccl"))


def test_alone_there_is_nobody_to_hear():
    import torch

    before = set(os.listdir("/proc/self/task"))
    with Pulse(World(0, 1, 0, torch.device("cpu"), "gloo"), 120) as pulse:
        pulse.at(1, "computing")
        assert set(os.listdir("/proc/self/task")) == before


def test_a_note_costs_a_step_next_to_nothing():
    import torch

    pulse = Pulse(World(0, 2, 0, torch.device("cpu"), "gloo"), 120)
    best = min(_seconds_of_notes(pulse) for _ in range(5))
    assert best < 20e-6


def _seconds_of_notes(pulse):
    begin = time.thread_time()  # of which a busy machine takes nothing
    for step in range(1000):
        pulse.at(step, "computing")
    return (time.thread_time() - begin) / 1000


def test_whoever_is_late_is_named_before_collectives_give_up():
    assert COLLECTIVE_TIMEOUT.total_seconds() > LONGEST_WAIT
    for section, key, rest in (
        (EngineConfig, "rank_timeout", {}),
        (DataConfig, "stall_timeout", {"train": {"shards": "x"}}),
    ):
        assert section.model_validate({key: LONGEST_WAIT, **rest})
        with pytest.raises(ValidationError, match=key):
            section.model_validate({key: LONGEST_WAIT + 1, **rest})


ORPHANS = """
import os, subprocess, sys, threading
from torch.utils.data import DataLoader
from mmd2v.distributed.processes import end_process

class Stuck:
    def __len__(self): return 8
    def __getitem__(self, index):
        child = subprocess.Popen(["sleep", "2000"], start_new_session=True)
        os.write(1, f"{os.getpid()} {child.pid}\\n".encode())
        threading.Event().wait()

batches = iter(DataLoader(Stuck(), batch_size=None, num_workers=2))
threading.Thread(target=lambda: (sys.stdin.readline(), end_process("a reason\\udcff")), daemon=True).start()
print("in no hurry to be flushed", end="")
next(batches)
"""


def test_the_end_leaves_no_loader_process_behind():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", ORPHANS], env=buffered, **pipes) as process:
        try:
            others = [int(pid) for _ in range(2) for pid in process.stdout.readline().split()]
            out, err = process.communicate("\n", timeout=LONG)
        finally:
            process.kill()
    assert process.returncode == LOST_STATUS
    assert out.endswith("in no hurry to be flushed") and err.endswith("error: a reason\\udcff\n")
    assert len(others) == 4
    wait_until(lambda: not any(map(_runs, others)))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
