"""A loader that is late says who is late, and ends when it is too late."""

import time

import pytest
import torch
from webdataset import DataPipeline

from mmd2v.config.schema import DataConfig
from mmd2v.data.batch import Batch
from mmd2v.data.loader import Loader, report_errors
from mmd2v.data.watch import Stage, WorkerStates
from mmd2v.data.workers import worker_share
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
    with pytest.raises(UserError, match=r"data\.stall_timeout: .* rank 3's worker 1, .* reading s3://b/40\.tar"):
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
