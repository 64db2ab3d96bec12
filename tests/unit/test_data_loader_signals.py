"""Loader processes and the signals that a scheduler sends to all processes of a job."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

from small import random_batch
from waiting import LONG, wait_until
from webdataset import DataPipeline

from mmd2v.config.schema import DataConfig
from mmd2v.data.loader import Loader, report_errors


def _source():
    for number in range(50):
        yield replace(random_batch(1, seed=number), sample_ids=(str(os.getpid()),))


def _loader() -> Loader:
    config = DataConfig(train={"shards": "unused"}, workers=1, prefetch=1)
    return Loader(DataPipeline(_source, report_errors), config, 50)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_worker_works_on_after_the_signals_and_ends_with_its_iteration():
    batches = iter(_loader())
    worker = int(next(batches).sample_ids[0])
    assert worker != os.getpid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker, number)
    assert [next(batches).sample_ids[0] for _ in range(20)] == [str(worker)] * 20
    batches.close()
    # torch asks, waits for five seconds, and sends SIGTERM.
    wait_until(lambda: not _is_there(worker))


def _stuck():
    yield random_batch(1)
    time.sleep(2 * LONG)


def test_worker_that_is_stuck_ends_at_torchs_signal():
    config = DataConfig(train={"shards": "unused"}, workers=1, prefetch=1)
    batches = iter(Loader(DataPipeline(_stuck, report_errors), config, 50))
    next(batches)
    batches.close()  # waits for five seconds
    for process in multiprocessing.active_children():
        process.join(LONG)
        assert not process.is_alive()
