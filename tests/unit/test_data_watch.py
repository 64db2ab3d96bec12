"""A loader that is late says who is late, and ends when it is too late."""

import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from webdataset import DataPipeline

from mmd2v.config.schema import DataConfig
from mmd2v.data.batch import Batch
from mmd2v.data.loader import Loader, report_errors
from mmd2v.data.watch import Stage, WorkerStates
from mmd2v.data.workers import worker_share
from mmd2v.distributed.processes import LOST_STATUS
from mmd2v.errors import UserError


class Slow:
    """Batches of which worker 1's come after ``seconds``."""

    def __init__(self, states, seconds):
        self.states, self.seconds = states, seconds

    def __call__(self):
        worker, _ = worker_share()
        for number in range(3):
            self.states.enter(Stage.READING, 0, 40 + number)
            if worker == 1:
                time.sleep(self.seconds)
            nothing = torch.zeros(0, dtype=torch.int32)
            yield Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), nothing, nothing, nothing.long())
            self.states.enter(Stage.WAITING)


def loader(seconds, **change):
    chosen = DataConfig.model_validate({"train": {"shards": "x"}, "workers": 2, "prefetch": 1, **change})
    states = WorkerStates(2)
    pipeline = DataPipeline(Slow(states, seconds), report_errors)
    return Loader(pipeline, chosen, None, states=states, shard_name=lambda set_, shard: f"s3://b/{shard}.tar", rank=3)


def test_a_late_worker_is_named_with_its_rank_and_shard(capfd):
    assert len(list(loader(1.2, stall_warning=0.4))) == 6
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("no batch for")]
    assert "waiting for rank 3's worker 1, which has been reading s3://b/40.tar for " in told[0]
    assert len(told) >= 2  # once an interval


def test_too_late_is_an_error_with_the_name(capfd):
    with pytest.raises(
        UserError, match=r"data\.stall_timeout: .* rank 3's worker 1, .* reading s3://b/40\.tar .*, on host "
    ):
        list(loader(60, stall_warning=0.5, stall_timeout=2))


def test_in_time_nothing_is_said(capfd):
    assert len(list(loader(0.0, stall_warning=5))) == 6
    assert "no batch" not in capfd.readouterr().err


def test_states_name_what_is_done():
    states = WorkerStates(2)
    assert states.describe(1, lambda *_: "x").startswith("worker 1, which has been starting for ")
    states.enter(Stage.DECODING, 1, 7)  # the training process counts as worker 0
    assert states.describe(0, lambda set_, shard: f"{set_}:{shard}").startswith(
        "worker 0, which has been decoding a sample of 1:7 for 0 s"
    )
    states.enter(Stage.TOKENIZING)
    assert "1:7" in states.describe(0, lambda set_, shard: f"{set_}:{shard}")


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
sys.path.insert(0, "tests/unit")
import test_data_watch as here
here.Slow.__call__ = lambda self: iter([self.states.enter(here.Stage.READING, 0, 40), threading.Event().wait()])
list(here.loader(0, workers=0, stall_warning=60, stall_timeout=1))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == LOST_STATUS, ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("error: data.stall_timeout: no batch in that time; waited for rank 3's worker 0, ")
    assert " reading s3://b/40.tar for " in told and told.endswith(f"on host {socket.gethostname()}")


def test_time_in_which_the_whole_process_is_stopped_is_no_wait():
    code = """
import os, sys, threading, time
from mmd2v.data.watch import Watchdog
with Watchdog(60, lambda: "it", end_after=3) as watchdog:
    watchdog.expect()
    print("waiting", flush=True)
    time.sleep(5.5)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
