"""Letting DeepSpeed's own tools read checkpoints: tensors and plain values only, and without their output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from mmd2v.train.checkpoints.storage import deepspeed_classes

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def allowed_classes() -> Iterator[None]:
    """Let torch.load with ``weights_only`` read the classes of DeepSpeed's checkpoints; may be nested."""
    # torch's own context manager would take away, on leaving, what an outer one has allowed.
    already = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([one for one in deepspeed_classes() if one not in already]):
        yield


@contextlib.contextmanager
def plain_values_only() -> Iterator[None]:
    """Make every torch.load of this process read tensors and allowed classes only.

    DeepSpeed's converters and its reader of universal checkpoints ask for full pickles, whose code would run.
    """
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with allowed_classes():
            yield
    finally:
        os.environ.pop(_WEIGHTS_ONLY)
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Hold back the lines and bars that DeepSpeed prints for its own command lines."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
