"""A plugin for runs under test: the process sends signals to its own group at moments that no test could hit from
outside. Each rank must lead a process group of its own.
"""

import atexit
import os
import signal

from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.loop import Run

RANK, STEP = os.environ.get("STOP_RANK", "0"), int(os.environ.get("STOP_AFTER", "0"))
_train_step, _save = Run._train_step, Checkpointer.save


def _send(number: signal.Signals) -> None:
    os.killpg(0, number)  # the group: as a scheduler does, the loader's processes too


def train_step(self, batches) -> None:
    _train_step(self, batches)
    if self.step + 1 == STEP:
        _send(signal.SIGUSR1)


def save(self, *arguments, **options):
    path = _save(self, *arguments, **options)
    _send(signal.SIGTERM)  # once more, in the middle of it
    return path


if os.environ.get("RANK", "0") == RANK and STEP:
    Run._train_step, Checkpointer.save = train_step, save
    atexit.register(_send, signal.SIGTERM)  # and again while the process ends
