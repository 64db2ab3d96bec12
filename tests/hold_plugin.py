"""A plugin for commands under test: after ``HOLD_AFTER`` steps, or files of stored outputs, of this process it waits
until a signal asks it to stop, or ends it, or whoever started it is gone. So a test that means to interrupt meets it at
work, however late it looks.
"""

import os
import time
from collections.abc import Callable

from mmd2v.data.annotation_files import ShardWriter
from mmd2v.train.loop import Run

AFTER = int(os.environ["HOLD_AFTER"])
_train_step, _write = Run._train_step, ShardWriter.write
_done, _parent = 0, os.getppid()


def _hold(asked: Callable[[], object]) -> None:
    global _done
    _done += 1
    while _done == AFTER and not asked():
        if os.getppid() != _parent:
            os._exit(1)
        time.sleep(0.01)


def train_step(self, batches) -> None:
    _train_step(self, batches)
    _hold(lambda: self.signals.asked)


def write(self) -> None:
    _write(self)
    _hold(lambda: False)


Run._train_step, ShardWriter.write = train_step, write
