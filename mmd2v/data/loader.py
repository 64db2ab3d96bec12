"""Loader processes around a pipeline of batches: errors without traceback, and never a silent stall."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType, TracebackType
from typing import Protocol

import torch
from torch.utils.data import DataLoader
from webdataset import DataPipeline

from mmd2v.config.schema import DataConfig
from mmd2v.data.batch import Batch
from mmd2v.data.handover import Parcel, Ring, send, start_worker
from mmd2v.data.watch import Watchdog, WorkerStates, stalled
from mmd2v.errors import UserError

_LOOKS_AGAIN = 5  # seconds from one look to the next, once there was a SIGTERM


class Order(Protocol):
    """What a loader tells of a training stream."""

    def epochs(self, index: int) -> dict[str, float]:
        """Set (empty: the only one) → passes over it before a position."""


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker: torch would wrap the exception itself in a traceback."""

    message: str


def report_errors(source: Iterator[Batch]) -> Iterator[Batch | Parcel | _Failure]:
    """Last stage of a pipeline: a UserError becomes an item, which the training process raises again."""
    try:
        yield from map(send, source)
    except UserError as error:
        yield _Failure(str(error))


class Loader:
    """Batches of one rank; every ``iter`` starts over. A UserError from a worker is raised here as it is.

    Attributes:
        batches: how many batches an iteration gives; None without end.
    """

    def __init__(
        self,
        pipeline: DataPipeline,
        config: DataConfig,
        batches: int | None,
        *,
        states: WorkerStates | None = None,
        shard_name: Callable[[int, int], str] = lambda set_, shard: f"shard {shard}",
        order: Order | None = None,
        rank: int = 0,
        images: tuple[int, int] | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """Wrap a pipeline of `Batch` in loader processes.

        Args:
            pipeline: ends in `report_errors`.
            config: the data section of a run.
            batches: how many batches an iteration gives; None without end.
            states: what the pipeline's stages report to.
            shard_name: (set, shard) → path, for messages.
            order: of a training stream.
            rank: this rank, for messages.
            images: (images of a batch, side of one), for memory shared with the workers; None: torch's way.
            pin_memory: pin the batches; None: when there is a CUDA device.
        """
        self.batches = batches
        # The tokenizers library must not start threads in forked loader processes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._workers = config.workers if batches is None else min(config.workers, batches)
        self._states = states or WorkerStates(self._workers)
        self._shard_name, self._rank = shard_name, rank
        self._order = order
        self._images, self._prefetch = images, config.prefetch
        self._stall_warning = config.stall_warning
        # torch ends the wait for a worker; a read in this very process only another thread can end.
        self._end_after = None if self._workers else config.stall_timeout
        self._loader: DataLoader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=config.prefetch if self._workers else None,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            timeout=config.stall_timeout or 0 if self._workers else 0,
        )

    def __iter__(self) -> Iterator[Batch]:
        given = 0

        def awaited() -> str:
            worker = given % max(1, self._workers)  # batches are handed out in turn
            told = self._states.describe(worker, self._shard_name)
            return f"rank {self._rank}'s {told}, on host {socket.gethostname()}"

        # A ring an iteration: the workers of an earlier one may have been ended at any point.
        ring = Ring(self._workers, self._prefetch, self._images) if self._images and self._workers else None
        # Workers outlive the scheduler's SIGTERM, but not torch's, which comes when the iteration is over: at its end,
        # or at that of the process where an error of ours has kept this very frame so long.
        over = torch.zeros(1, dtype=torch.uint8).share_memory_()
        end = partial(over.fill_, 1)
        self._loader.worker_init_fn = partial(_start_worker, ring, over)
        batches = iter(self._loader)  # forks: before the watchdog's thread, of which a fork would copy half
        atexit.register(end)  # after torch has registered its own, hence called before that
        try:
            with Watchdog(self._stall_warning, awaited, self._end_after) as watchdog:
                while True:
                    watchdog.expect()
                    try:
                        item = next(batches)
                    except StopIteration:
                        return
                    except RuntimeError as error:
                        explained = _explained(error, awaited())
                        if explained is None:
                            raise
                        raise explained from error.with_traceback(None)
                    finally:
                        watchdog.arrived()
                    if isinstance(item, _Failure):
                        raise UserError(item.message)
                    given += 1
                    yield item.open() if isinstance(item, Parcel) else item
        finally:
            # Ends the workers now. Left to the garbage collector, their queues may go first, and torch would wait for
            # seconds for workers that never hear of the end.
            end()
            del batches
            atexit.unregister(end)

    def epochs(self, index: int) -> dict[str, float]:
        """Passes over the data before a position (a sample, or a step of tokens).

        ``epoch``, or ``epoch/SET`` for every set of a mixture.
        """
        passes = self._order.epochs(index) if self._order is not None else {}
        return {f"epoch/{name}" if name else "epoch": number for name, number in passes.items()}

    def __len__(self) -> int:
        """Batches of a finite loader."""
        if self.batches is None:
            raise TypeError("a training loader has no length: it never ends")
        return self.batches


def _explained(error: RuntimeError, awaited: str) -> Exception | None:
    """Return what the user should read of an error of torch's DataLoader; None of a mistake of ours in a worker."""
    told = str(error)
    if told.startswith("DataLoader timed out"):
        return UserError(stalled(awaited))
    if told.startswith("DataLoader worker (pid"):
        return UserError(
            f"a loader process died ({told.splitlines()[0]}): most often the machine ran out of memory or of "
            f"shared memory (/dev/shm); lower data.workers or data.prefetch. Waited for {awaited}"
        )
    return None


def _outlive(parent: int, over: torch.Tensor, number: int, frame: FrameType | None) -> None:
    """Answer SIGTERM, and then SIGALRM, in a worker: end when the iteration is over or the training process gone."""
    if over.item() or os.getppid() != parent:
        os._exit(0)
    signal.alarm(_LOOKS_AGAIN)


def _start_worker(ring: Ring | None, over: torch.Tensor, worker: int) -> None:
    start_worker(ring)
    # One process a core: more threads in each would only fight.
    torch.set_num_threads(1)
    # Ctrl-C goes to the whole group; the training process answers it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So do a scheduler's signals: the training process finishes its step or evaluation with the batches it needs.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, partial(_outlive, os.getppid(), over))
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Python's thread that hands over shared memory: the training process has hung up, which is its good right.
        if not isinstance(error, (ConnectionError, EOFError)):
            shown(kind, error, trace)

    sys.excepthook = hook
