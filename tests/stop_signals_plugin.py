"""A plugin for runs under test: the process sends signals to its own group at moments that no test could hit from
outside. Each rank must lead a process group of its own.

``STOP_RANK`` (0 where it is not set) does so after step ``STOP_AFTER`` of the run named ``STOP_RUN`` (or of any),
with ``STOP_SIGNAL`` (SIGUSR1); or, with ``STOP_EXPORT``, while the stage of that name is exported.
"""

import atexit
import os
import signal

from mmd2v.train import pipeline
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.loop import Run

RANK, STEP = os.environ.get("STOP_RANK", "0"), int(os.environ.get("STOP_AFTER", "0"))
RUN, EXPORT = os.environ.get("STOP_RUN"), os.environ.get("STOP_EXPORT")
NUMBER = signal.Signals[os.environ.get("STOP_SIGNAL", "SIGUSR1")]
_train_step, _save, _finish = Run._train_step, Checkpointer.save, pipeline._finish
_sent: list[signal.Signals] = []


def _send(number: signal.Signals) -> None:
    _sent.append(number)
    os.killpg(0, number)  # the group: as a scheduler does, the loader's processes too


def train_step(self, batches) -> None:
    _train_step(self, batches)
    if self.step + 1 == STEP and RUN in (None, self.config.name):
        _send(NUMBER)


def save(self, *arguments, **options):
    path = _save(self, *arguments, **options)
    if _sent:
        _send(signal.SIGTERM)  # once more, in the middle of it
    return path


def finish(stage) -> None:
    if stage.name == EXPORT:
        _send(NUMBER)
    _finish(stage)


if os.environ.get("RANK", "0") == RANK and (STEP or EXPORT):
    Run._train_step, Checkpointer.save, pipeline._finish = train_step, save, finish
    atexit.register(_send, signal.SIGTERM)  # and again while the process ends
