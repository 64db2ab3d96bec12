"""A loader that is late says who is late, and ends when it is too late."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from waiting import LONG, wait_until
from webdataset import DataPipeline

import mmd2v.data.loader
from mmd2v.config.schema import DataConfig
from mmd2v.data import watch
from mmd2v.data.batch import Batch
from mmd2v.data.loader import Loader, report_errors
from mmd2v.data.watch import Stage, Watchdog, WorkerStates
from mmd2v.data.workers import worker_share
from mmd2v.distributed.processes import LOST_STATUS
from mmd2v.errors import UserError


class Late:
    """Batches of which one worker's come when ``may_go`` is set; worker 0 reads shards 40 …, worker 1 shards 50 …"""

    def __init__(self, states, late, may_go):
        self.states, self.late, self.may_go = states, late, may_go

    def __call__(self):
        worker, _ = worker_share()
        for number in range(3):
            self.states.enter(Stage.READING, 0, 40 + 10 * worker + number)
            if worker == self.late:
                self.may_go.wait(LONG)
            nothing = torch.zeros(0, dtype=torch.int32)
            yield Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), nothing, nothing, nothing.long())
            self.states.enter(Stage.WAITING)


def loader(late=None, may_go=None, named=lambda shard: None, **change):
    """Batches of `Late`; ``named`` is called with every shard that is named."""
    chosen = DataConfig.model_validate({"train": {"shards": "x"}, "workers": 2, "prefetch": 1, **change})
    states = WorkerStates(2)

    def shard_name(set_, shard):
        named(shard)
        return f"s3://b/{shard}.tar"

    pipeline = DataPipeline(Late(states, late, may_go), report_errors)
    return Loader(pipeline, chosen, None, states=states, shard_name=shard_name, rank=3)


def test_a_late_worker_is_named_with_its_rank_and_shard(capfd):
    may_go, named = multiprocessing.Event(), []

    def told(shard):
        named.append(shard)
        if named.count(50) == 2:  # once an interval
            may_go.set()

    assert len(list(loader(1, may_go, told, stall_warning=0.4))) == 6
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("no batch for")]
    late = "waiting for rank 3's worker 1, which has been reading s3://b/50.tar for "
    assert sum(late in line for line in warnings) >= 2


def test_too_late_is_an_error_with_the_name(monkeypatch):
    class Begun(Watchdog):
        def expect(self):
            wait_until(lambda: "reading" in self._describe())  # a worker that starts late would be named as starting
            super().expect()

    monkeypatch.setattr(mmd2v.data.loader, "Watchdog", Begun)
    with pytest.raises(
        UserError, match=r"data\.stall_timeout: .* rank 3's worker 0, .* reading s3://b/40\.tar .*, on host "
    ):
        list(loader(0, multiprocessing.Event(), stall_warning=0.5, stall_timeout=2))


def test_in_time_nothing_is_said(capfd):
    assert len(list(loader(stall_warning=100))) == 6
    assert "no batch" not in capfd.readouterr().err


def test_states_name_what_is_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    states = WorkerStates(2)
    assert states.describe(1, lambda *_: "x") == "worker 1, which has been starting for 0 s"
    states.enter(Stage.DECODING, 1, 7)  # the training process counts as worker 0
    now[0] = 161.0
    assert states.describe(0, lambda set_, shard: f"{set_}:{shard}") == (
        "worker 0, which has been decoding a sample of 1:7 for 61 s"
    )
    states.enter(Stage.TOKENIZING)
    assert states.describe(0, lambda set_, shard: f"{set_}:{shard}").endswith(" 1:7 for 0 s")


class Broken:
    """A mistake of ours in a worker."""

    def __call__(self):
        raise RuntimeError("shape mismatch in DataLoader worker code")
        yield


def test_a_mistake_in_a_worker_keeps_its_traceback():
    chosen = DataConfig.model_validate({"train": {"shards": "x"}, "workers": 1, "prefetch": 1})
    with pytest.raises(RuntimeError, match="shape mismatch in DataLoader worker code") as caught:
        list(Loader(DataPipeline(Broken(), report_errors), chosen, None))
    assert not isinstance(caught.value, UserError) and "in __call__" in str(caught.value)


def test_too_late_in_the_training_process_ends_it_with_the_name():
    code = """
import threading, sys
sys.path[:0] = ["tests/unit", "tests"]
import test_data_watch as here
here.Late.__call__ = lambda self: iter([self.states.enter(here.Stage.READING, 0, 40), threading.Event().wait()])
list(here.loader(workers=0, stall_warning=60, stall_timeout=1))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == LOST_STATUS, ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("error: data.stall_timeout: no batch in that time; waited for rank 3's worker 0, ")
    assert " reading s3://b/40.tar for " in told and told.endswith(f"on host {socket.gethostname()}")


def test_time_in_which_the_whole_process_is_stopped_is_no_wait():
    code = """
import os, signal, threading
from mmd2v.data.watch import Watchdog
waited = threading.Event()
def describe():  # at the first warning, a second of waiting after the stop: enough is seen
    watchdog.arrived()
    waited.set()
    return "it"
with Watchdog(1, describe, end_after=4) as watchdog:
    watchdog.expect()
    os.kill(os.getpid(), signal.SIGSTOP)
    waited.wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)  # it stops itself: however late this is read, it did not wait
        assert os.WIFSTOPPED(status), process.stderr.read()
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        told = process.communicate(timeout=300)[1]
        assert process.returncode == 0, told
        assert re.match(r"no batch for [1-3] s: waiting for it", told)
