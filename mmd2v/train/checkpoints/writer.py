"""The files that one rank adds to a checkpoint: written in the background from copies, or at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mmd2v.errors import disk_message
from mmd2v.train.checkpoints.checksums import Checksum
from mmd2v.train.checkpoints.direct_file import DirectFile
from mmd2v.train.checkpoints.host_copy import HostBuffers
from mmd2v.train.checkpoints.tensor_file import TensorFile, write_tensors

_NICENESS = 10  # behind the training where cores are short, but not so far that it never gets one
_PATIENCE_S = 20.0  # of `abandon`: a disk that does not answer must not keep a process from ending


class CheckpointWriter:
    """What this rank writes of one checkpoint, and how that went.

    With ``buffers``, `add` copies to the host and `start` begins to write in a thread; without, `add` writes. The first
    error is remembered and nothing is written after it: a rank that raised would leave the others waiting for it.
    """

    def __init__(self, folder: Path, buffers: HostBuffers | None) -> None:
        self.folder = folder
        self.files: dict[str, Checksum] = {}
        """Name → size and SHA-256 of what is written so far."""
        self.error: str | None = None
        self.cause: Exception | None = None
        self._buffers = buffers
        self._queue: list[tuple[str, Any]] = []
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        if buffers is not None:
            buffers.begin()

    def add(self, name: str, value: Any) -> None:
        """Take ``value`` as it is now for the file ``name``: a `TensorFile`, or anything for torch.save."""
        if self.error is not None:
            return
        with self.noting_errors():
            if self._buffers is None:
                self._write(name, value)
            elif isinstance(value, TensorFile):
                self._queue.append((name, TensorFile(self._buffers.copy(dict(value.tensors)), value.metadata)))
            else:
                self._queue.append((name, self._buffers.copy(value)))

    def add_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Take tensors as they are now for the safetensors file ``name``."""
        host = tensors if self._buffers is not None else {key: value.cpu() for key, value in tensors.items()}
        self.add(name, TensorFile(host, metadata or {}))

    def start(self) -> None:
        """Begin to write what was added, all of which is copied when this returns."""
        if self._buffers is None:
            return
        with self.noting_errors():
            self._buffers.complete()
        # A daemon: nothing but `abandon` may hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until everything is written or has failed."""
        if self._thread is not None:
            self._thread.join()

    def abandon(self) -> None:
        """Stop writing as soon as possible; what is written so far is of no use."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Keep an error as this writer's, if it is the first, instead of letting it out."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error, self.cause = _message(error), error

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        with self.noting_errors():
            if self.error is None:
                for name, value in self._queue:
                    self._write(name, value)
        self._queue = []

    def _write(self, name: str, value: Any) -> None:
        with DirectFile(self.folder / name, self._abandoned) as file:
            if isinstance(value, TensorFile):
                write_tensors(value, file.write)
            else:
                _torch_save(value, file)
        self.files[name] = (file.size, file.digest.hexdigest())


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return disk_message(error)
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def _torch_save(value: Any, file: DirectFile) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:
        # torch's archive, closed after a failed write, complains about its own position instead of the disk.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
